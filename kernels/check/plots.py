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


def rate_of_products(name, bounds):
    """TFLOP/s of this card for a case: of fp8 where it multiplies fp8 and that was measured, else of bf16."""
    is_fp8 = "gemm Fp8" in name
    return (bounds.get("fp8_tflop_per_s") if is_fp8 else None) or bounds.get("bf16_tflop_per_s")


def share_of_bound(case, copy, product):
    """Of the time that the bytes or the FLOPs need at this card's own rates, whichever is longer: the share, and the rate that
    it is of. None where a rate is not known."""
    if not copy or not product or "milliseconds" not in case:
        return None
    # Bytes are counted once each, a copy's rate is of reading and writing together: the same unit.
    bytes_need, flops_need = case["bytes"] / copy / 1e6, case["flops"] / product / 1e9
    rate = f"{copy:.4g} GB/s" if bytes_need >= flops_need else f"{product:.4g} TFLOP/s"
    return max(bytes_need, flops_need) / case["milliseconds"], rate


def theirs(name, bounds):
    """PyTorch's milliseconds for a case and how it took them, or why there are none; a Hopper kernel does what another one does."""
    portable = name.removeprefix("hopper_")
    for other in (name, portable, portable.replace("mla_decode ", "mla_decode Bf16 ")):
        if other in bounds.get("torch", {}):
            return f"{bounds['torch'][other]:.4g} ({bounds.get('by', {}).get(other, 'PyTorch')})"
        if other in bounds.get("absent", {}):
            return "absent"
    return ""


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


def starts(line):
    """Table of the start from files."""
    runs = line.get("runs", [])
    if not runs:
        return []
    table = ["", f"Start of {line['model']} from {runs[0]['bytes'] / 1e9:.3g} GB of files, from the driver's opening to the first "
             "token; weights beside what reading the files and copying to the device reach alone:", "",
             "| Device s | Weights s | First token s | All s | Weights GB/s | Read GB/s | Copy GB/s | Of the slower |",
             "|---|---|---|---|---|---|---|---|"]
    for run in runs:
        seconds = " | ".join(f"{run[f'{name}_seconds']:.3g}" for name in ("open", "load", "first_token", "start"))
        rates = " | ".join(f"{run[f'{name}_gb_per_s']:.3g}" for name in ("load", "read_by_all", "copy"))
        table.append(f"| {seconds} | {rates} | {100 * run['share_of_bound']:.0f} % |")
    return table


def write(out, lines, emulated):
    mark = " (emulated driver: times mean nothing)" if emulated else ""
    bounds = lines.get("bounds", {})
    copy, product = bounds.get("copy_gb_per_s"), bounds.get("bf16_tflop_per_s")
    cases = [case for case in lines.get("speed", {}).get("cases", []) if "milliseconds" in case]
    by_bytes = [(case["name"], case["gb_per_s"], copy) for case in cases if case["flops"] < 100 * case["bytes"]]
    by_flops = [(case["name"], case["tflop_per_s"], rate_of_products(case["name"], bounds))
                for case in cases if case["flops"] >= 100 * case["bytes"]]
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
    table = ["# Check of the kernels" + mark, "", "| Line | Result | Seconds |", "|---|---|---|"]
    for name, line in lines.items():
        state = line.get("skipped") or line.get("error") or ("ok" if line.get("ok") else "failed")
        table.append(f"| {name} | {state} | {line['seconds']} |")
    rates = f"Copy {copy} GB/s, bf16 product {product} TFLOP/s, fp8 product {bounds.get('fp8_tflop_per_s', 'unknown')} TFLOP/s."
    table += ["", rates if copy else "This card's own rates were not measured.", "",
              "| Case | ms | GB/s | TFLOP/s | Of bound | PyTorch ms |", "|---|---|---|---|---|---|"]
    for case in cases:
        share = share_of_bound(case, copy, rate_of_products(case["name"], bounds))
        table.append(f"| {case['name']} | {case['milliseconds']:.4g} | {case['gb_per_s']:.4g} | {case['tflop_per_s']:.4g} | "
                     f"{'' if share is None else f'{100 * share[0]:.0f} % of {share[1]}'} | {theirs(case['name'], bounds)} |")
    table += whole_models(lines, whole, layers) + starts(lines.get("start", {}))
    (out / "table.md").write_text("\n".join(table) + "\n")
