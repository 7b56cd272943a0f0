"""What slices of a model say about the whole, and what memory bandwidth alone allows: arithmetic on configs and times, no device.

A decode step of a model with k dense and l - k mixed layers takes

    fixed + k * dense + (l - k) * mixed

where fixed is everything outside the layers. Three slices of true width give the three terms: one dense layer, three dense
layers, and one dense with one mixed layer. They are times of one device that would hold all of it: what a larger memory
would cost, and what several devices that share the layers have to beat together.
"""

import math

# Layers, dense ones first, of the slices that are timed.
SLICES = {"one-dense": (1, 1), "three-dense": (3, 3), "one-mixed": (2, 1)}


def slices(config):
    """The config of each slice, by name."""
    return {name: config | {"num_hidden_layers": layers, "first_k_dense_replace": dense}
            for name, (layers, dense) in SLICES.items()}


def extrapolate(config, seconds):
    """Seconds of a step of the whole from those of the slices, and the terms.

    Refuses times from which a layer would take no time or less: they say that the clock, and not the layers, was measured.
    """
    missing = [name for name in SLICES if not math.isfinite(seconds.get(name, math.nan)) or seconds[name] <= 0]
    if missing:
        raise ValueError(f"no time of {', '.join(missing)}")
    one, three, mixed = (seconds[name] for name in SLICES)
    dense = (three - one) / 2
    terms = {"dense": dense, "mixed": mixed - one, "fixed": one - dense}
    bad = [f"{name} {term:.3g} s" for name, term in terms.items() if term <= 0]
    if bad:
        raise ValueError(f"the slices took {one:.3g}, {three:.3g} and {mixed:.3g} s, which makes {', '.join(bad)}")
    layers, first = config["num_hidden_layers"], config["first_k_dense_replace"]
    step = terms["fixed"] + first * dense + (layers - first) * terms["mixed"]
    return {"step_seconds": step, **{f"{name}_seconds": term for name, term in terms.items()}}


def attention_parameters(config):
    """Weights of one layer's latent attention, published form."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    wide = heads * (nope + rope)
    low = config.get("q_lora_rank")
    query = hidden * low + low * wide if low else hidden * wide
    return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden


def read_parameters(config, batch):
    """Weights that a decode step of `batch` sequences has to read at least: those of all layers and of the head, of the
    experts those that are chosen. The gate of a random model chooses evenly, so that batch b reads
    n (1 - (1 - k / n)^b) of n experts on average; for one sequence this is k, exactly."""
    hidden, layers, first = config["hidden_size"], config["num_hidden_layers"], config["first_k_dense_replace"]
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    touched = experts * (1 - (1 - chosen / experts) ** batch)
    mixed = (touched + config["n_shared_experts"]) * 3 * hidden * config["moe_intermediate_size"] + experts * hidden
    dense = 3 * hidden * config["intermediate_size"]
    return layers * attention_parameters(config) + first * dense + (layers - first) * mixed + config["vocab_size"] * hidden


def share_of_bandwidth(config, line, copy_gb_per_s):
    """Of the tokens per second that reading bf16 weights and the latent cache once a step would allow at `copy_gb_per_s`."""
    latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    cache = line["batch"] * line["context"] * config["num_hidden_layers"] * latent
    read = 2 * (read_parameters(config, line["batch"]) + cache)
    return read / (copy_gb_per_s * 1e9) / line["step_seconds"]
