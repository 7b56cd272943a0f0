"""The table and the plots of a check: plain SVG, so that they need no library."""

import html

WIDTH, BAR, LEFT = 900, 18, 340


def bars(title, rows, unit):
    """`rows` are (label, value, bound): a bar for each, and a mark where the bound is."""
    most = max((max(value, bound or 0) for _, value, bound in rows), default=1) or 1
    scale = (WIDTH - LEFT - 90) / most
    height = 40 + BAR * len(rows)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="11">',
           f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
           f'<text x="8" y="20" font-size="14">{html.escape(title)}</text>']
    for index, (label, value, bound) in enumerate(rows):
        y = 34 + BAR * index
        out.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{html.escape(label)}</text>')
        out.append(f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR - 5}" fill="#3b6ea5"/>')
        if bound:
            out.append(f'<rect x="{LEFT + bound * scale:.1f}" y="{y - 2}" width="2" height="{BAR - 1}" fill="#c0392b"/>')
        share = f" ({100 * value / bound:.0f} %)" if bound else ""
        out.append(f'<text x="{LEFT + value * scale + 5:.1f}" y="{y + 11}">{value:.4g} {unit}{share}</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


def share_of_bound(case, copy, product):
    """Of the time that the bytes or the FLOPs need at this card's own rates, whichever is longer."""
    if not copy or not product or "milliseconds" not in case:
        return None
    # Bytes are counted once each, a copy's rate is of reading and writing together: the same unit.
    bound = max(case["bytes"] / copy / 1e6, case["flops"] / product / 1e9)
    return bound / case["milliseconds"]


def whole_models(lines, whole, layers):
    """Tables of decode steps."""
    table = ["", "| Model | Batch | Context | Step ms | Tokens/s | Of bandwidth |", "|---|---|---|---|---|---|"]
    for model, found in lines.get("model", {}).get("models", {}).items():
        for line in found.get("decode", []):
            share = line.get("share_of_bandwidth")
            table.append(f"| {model} | {line['batch']} | {line['context']} | {1e3 * line['step_seconds']:.4g} | "
                         f"{line['tokens_per_second']:.4g} | {'' if share is None else f'{100 * share:.0f} %'} |")
    if whole:
        table += ["", f"All {layers} layers of V3 on one device that would hold them, from slices:", "",
                  "| Batch | Dense layer ms | Mixed layer ms | Rest ms | Step ms | Tokens/s |", "|---|---|---|---|---|---|"]
        for line in whole:
            terms = " | ".join(f"{1e3 * line[f'{name}_seconds']:.4g}" for name in ["dense", "mixed", "fixed", "step"])
            table.append(f"| {line['batch']} | {terms} | {line['tokens_per_second']:.4g} |")
    return table


def write(out, lines, emulated):
    mark = " (emulated driver: times mean nothing)" if emulated else ""
    bounds = lines.get("bounds", {})
    copy, product = bounds.get("copy_gb_per_s"), bounds.get("bf16_tflop_per_s")
    cases = [case for case in lines.get("speed", {}).get("cases", []) if "milliseconds" in case]
    by_bytes = [(case["name"], case["gb_per_s"], copy) for case in cases if case["flops"] < 100 * case["bytes"]]
    by_flops = [(case["name"], case["tflop_per_s"], product) for case in cases if case["flops"] >= 100 * case["bytes"]]
    for name, title, rows, unit in [("bandwidth", "Bytes moved", by_bytes, "GB/s"), ("flops", "Arithmetic", by_flops, "TFLOP/s")]:
        if rows:
            (out / f"{name}.svg").write_text(bars(title + mark, rows, unit))
    decode = [(f"{model}, batch {line['batch']}", line["tokens_per_second"], None)
              for model, found in lines.get("model", {}).get("models", {}).items() for line in found.get("decode", [])]
    layers = lines.get("slices", {}).get("layers")
    whole = [line for line in lines.get("slices", {}).get("whole", []) if "error" not in line]
    decode += [(f"v3, {layers} layers from slices, batch {line['batch']}", line["tokens_per_second"], None) for line in whole]
    if decode:
        (out / "decode.svg").write_text(bars("Decode" + mark, decode, "tokens/s"))
    theirs = bounds.get("torch", {})
    table = ["# Check of the kernels" + mark, "", "| Line | Result | Seconds |", "|---|---|---|"]
    for name, line in lines.items():
        state = line.get("skipped") or line.get("error") or ("ok" if line.get("ok") else "failed")
        table.append(f"| {name} | {state} | {line['seconds']} |")
    table += ["", f"Copy {copy} GB/s, bf16 product {product} TFLOP/s." if copy else "This card's own rates were not measured.", "",
              "| Case | ms | GB/s | TFLOP/s | Of bound | PyTorch ms |", "|---|---|---|---|---|---|"]
    for case in cases:
        share = share_of_bound(case, copy, product)
        torch_ms = theirs.get(case["name"])
        table.append(f"| {case['name']} | {case['milliseconds']:.4g} | {case['gb_per_s']:.4g} | {case['tflop_per_s']:.4g} | "
                     f"{'' if share is None else f'{100 * share:.0f} %'} | {'' if torch_ms is None else f'{torch_ms:.4g}'} |")
    table += whole_models(lines, whole, layers)
    (out / "table.md").write_text("\n".join(table) + "\n")
