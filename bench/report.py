"""Renews bench/results/headline.json, the plots and the tables of docs/performance.md from the raw
files in bench/results. Standard library only; `make gpu-bench` runs it.

    python bench/report.py [--results bench/results] [--docs docs]
"""

import argparse
import json
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import crossover
import headline
import memory
import memory_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = ROOT / "bench/step_rows.json"
# Weights of the frozen linears and of lm_head, layers, and width of all heads together.
MODELS = {"llama-3.1-8b": (32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
                           + 128256 * 4096, 32, 4096),
          "smollm2-135m": (30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
                           + 49152 * 576, 30, 576)}


def model_flops(row):
    """Of a step: 4 FLOP per frozen weight and token; causal attention 6 T^2 width a layer and
    sequence."""
    weights, layers, width = MODELS[row["model"]]
    attention = layers * 6 * row["length"] ** 2 * width
    sequences = row.get("gang", 1) * row.get("accum", 1) * row["batch"]
    return sequences * (row["length"] * 4 * weights + attention)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |",
             "| --- |" + " ---: |" * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def shown(value, digits=4):
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def by_case(raw, file, prefix=""):
    """{case: {implementation: row}} of the cases whose name begins with `prefix`: the rows of one
    call, the latest that has both sides of the case, or else the latest that has ours."""
    calls = {}  # {case: {call: {side: {implementation: row}}}}
    for side in ("ours", "peers"):
        for row in raw.get(file, {}).get(side, []):
            case, implementation = row["name"].rsplit("/", 1)
            if case.startswith(prefix):
                of_call = calls.setdefault(case.removeprefix(prefix), {})
                found = of_call.setdefault(row["call"], {})
                found.setdefault(side, {})[implementation] = row
    chosen = {case: found[max(found, key=lambda call: (len(found[call]), "ours" in found[call], call))]
              for case, found in calls.items()}
    return {case: found.get("ours", {}) | found.get("peers", {}) for case, found in chosen.items()}


def under_load(call):
    """Least, median and most of clock, power and temperature while each side ran."""
    parts = []
    for side in ("ours", "peers"):
        state = call.get(f"state_{side}") or {}
        texts = [" to ".join(f"{value:.0f}" for value in state[field][::2]) +
                 f" {unit} (median {state[field][1]:.0f})"
                 for field, unit in (("clocks.sm", "MHz"), ("power.draw", "W"),
                                     ("temperature.gpu", "C")) if field in state]
        texts += [f"{name} {100 * share:.0f} % of the time"
                  for name, share in state.get("reasons", {}).items()]
        parts += [f"while {side} ran: " + ", ".join(texts)] if texts else []
    return parts


def provenance(raw, file):
    """Where the rows of a file come from."""
    lines, calls = [], raw.get(file, {}).get("calls", [])
    for number, call in enumerate(calls, 1):
        gpu, before, after = (call.get(k) or {} for k in ("gpu", "state_before", "state_after"))
        driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
        part = [f"{gpu.get('name')}{driver}", f"commit {call.get('commit')}",
                call.get("date", "")]
        for when, state in (("before", before), ("after", after)):
            if state.get("clocks.sm") is not None:
                part.append(f"{when}: {state['clocks.sm']:.0f} MHz, {state['power.draw']:.0f} W, "
                            f"{state['temperature.gpu']:.0f} C")
        part += under_load(call)
        versions = call.get("peer_versions") or {}
        if versions:
            part.append(", ".join(f"{k} {v}" for k, v in versions.items()))
        for peer in call.get("missing_peers") or {}:
            part.append(f"MISSING: {peer}")
        lines.append(f"Measured{f' in call {number}' if len(calls) > 1 else ''}: "
                     + "; ".join(part) + ".")
    return "\n\n".join(lines)


def headline_table(entries):
    rows = []
    for e in entries:
        bound = "≥" if e["bound"] == "at least" else "≤"
        what = e["unit"] if e["compare"] == "ours" else ""
        note = " ".join(t for t in (e["reason"], e["next"] and f"Next: {e['next']}") if t)
        rows.append([e["name"], f"{shown(e['ours'])} {e['unit']}" if e["ours"] else "-",
                     shown(e["peer"]), shown(e["ratio"], 3),
                     f"{bound} {shown(e['target'])} {what}".strip(),
                     "yes" if e["met"] else "**no**", note])
    return table(["what", "ours", "beside", "ratio", "target", "met", "reason, next idea"], rows)


def step_table(raw):
    found = by_case(raw, "step")
    rows = []
    for row in json.loads(ROWS.read_text()):
        for name, result in found.get(row["name"], {}).items():
            if "error" in result:
                rows.append([row["name"], name, result["error"]] + [""] * 5 + [str(result["call"] + 1)])
                continue
            seconds = result["step_seconds"]
            gpu_seconds = seconds * row.get("replicas", {}).get(name, 1)
            rows.append([row["name"], name, f"{result['tokens_per_s']:,.0f}",
                         f"{1e3 * seconds:.2f}", f"{result.get('noise_percent', 0):.1f} %",
                         f"{1e-9 * result['peak_bytes']:.2f}",
                         f"{1e-12 * model_flops(row) / gpu_seconds:.1f}",
                         "yes" if result.get("graphs_off_equal") else "-", str(result["call"] + 1)])
    return table(["row", "who", "tokens/s", "ms a step", "noise", "peak, GB", "model TFLOP/s",
                  "bits of graphs off", "call"], rows)


def long_table(raw):
    """What bench/long.py measured."""
    def gigabytes(entry, key):
        return f"{1e-9 * entry[key]:.2f}" if key in entry else "-"
    rows = [[e["name"].removesuffix("/qlab"), e.get("device_memory", "-"), shown(e.get("tokens")),
             shown(e.get("start_seconds", e["seconds"])), shown(e.get("step_seconds")),
             shown(e.get("tokens_per_s")), gigabytes(e, "peak_bytes"),
             gigabytes(e, "step_moved_bytes"), shown(e.get("step_stalled_seconds"))]
            for e in raw.get("long", {}).get("ours", [])]
    return table(["run", "limit", "sequence", "s to the first step", "s a step", "tokens/s",
                  "peak, GB", "moved a step, GB", "s stalled a step"], rows)


def paging_table(raw):
    """What an optimizer's pages cost, beside the same run without."""
    def ms(seconds):
        return "-" if seconds is None else f"{1e3 * seconds:.1f}"
    rows = [[e["name"].removesuffix("/qlab"), e.get("device_memory", "-"),
             *(f"{1e-9 * e[key]:.2f}" if key in e else "-"
               for key in ("state_bytes", "host_bytes", "step_moved_bytes")),
             ms(e["step_seconds"]), ms(e["step_stalled_seconds"]), ms(e.get("added_seconds")),
             shown(e.get("GB/s"), 3)]
            for e in raw.get("long", {}).get("ours", []) if "host_bytes" in e]
    return table(["run", "limit", "states, GB", "on the host", "moved a step", "ms a step",
                  "of it stalled", "more than unpaged", "GB/s each way"], rows)


def cpu_table(raw):
    """SmolLM2-135M in fp32 on the CPU, both with the same threads (bench/cpu_step.py)."""
    rows = [[case, name, shown(row["tokens_per_s"]), f"{row['step_seconds']:.2f}"]
            for case, found in by_case(raw, "cpu_step").items()
            for name, row in found.items()]
    return table(["row", "who", "tokens/s", "s a step"], rows)


def linear_rows(raw):
    """{(pass, shape): {M: {implementation: {"us", "ratio"}}}}: the ratio to the dense layer is that
    of pairs timed in turns where there are any, otherwise to the faster dense one."""
    rows = {}
    for case, found in by_case(raw, "linear", "linear/").items():
        direction, shape, m = case.split("/")
        timed = {name: r for name, r in found.items() if "us" in r}
        base = min((timed[name]["us"] for name in ("dense", "torch") if name in timed),
                   default=None)
        rows.setdefault((direction, shape), {})[int(m[1:])] = {
            name: {"us": r["us"], "ratio": r.get("over_beside", base and r["us"] / base)}
            for name, r in timed.items()}
    return rows


def linear_table(raw):
    parts = []
    for (direction, shape), rows in linear_rows(raw).items():
        if shape not in crossover.SHAPES:
            continue
        names = sorted({name for row in rows.values() for name in row} - {"dense"})
        body = []
        for m, row in sorted(rows.items()):
            def cell(name):
                if name not in row:
                    return "-"
                ratio = row[name]["ratio"]
                return shown(row[name]["us"]) + (f" ({ratio:.2f})" if ratio else "")
            body.append([str(m), shown(row.get("dense", {}).get("us"))] +
                        [cell(name) for name in names])
        parts.append(f"{direction}, {shape}: microseconds (over the dense one)\n\n" +
                     table(["M", "dense"] + names, body))
    return "\n\n".join(parts)


def best_linear_table(raw):
    """Per matrix and number of rows the fastest of our implementations that reads NF4."""
    cases = {key: rows for key, rows in linear_rows(raw).items()
             if any("scratch" in row for row in rows.values())}
    others = {"dense", "resident"} | {row["name"].rsplit("/", 1)[1]
                                       for row in raw.get("linear", {}).get("peers", [])}
    rows_of_x = sorted({m for rows in cases.values() for m in rows})

    def size(shape):
        n, k = map(int, shape.split("x"))
        return n * k, n

    def cell(row):
        own = {name: r for name, r in row.items() if name not in others}
        if not own:
            return "-"
        best = min(own, key=lambda name: own[name]["us"])
        text = best + (f" {own[best]['ratio']:.2f}" if own[best]["ratio"] else "")
        peer = row.get("bitsandbytes")
        return text + (f" ({own[best]['us'] / peer['us']:.2f})" if peer else "")

    body = [[f"{direction} {shape}"] + [cell(rows.get(m, {})) for m in rows_of_x]
            for (direction, shape), rows in sorted(
                cases.items(), key=lambda case: (case[0][0] == "dx", size(case[0][1])))]
    return table(["M ="] + [str(m) for m in rows_of_x], body)


def product_table(raw):
    """Per matrix and number of rows the fastest of the library's other proposals, over its choice."""
    cases = {}
    for case, found in by_case(raw, "product", "product/").items():
        direction, shape, m = case.split("/")
        timed = [row for row in found.values() if "over_beside" in row]
        if timed:
            best = min(timed, key=lambda row: row["over_beside"])
            cases.setdefault((direction, shape), {})[int(m[1:])] = (
                f"{best['over_beside']:.3f} ± {best.get('over_beside_noise_percent', 0):.1f} % "
                f"of {shown(best['beside_us'])}")
    rows_of_x = sorted({m for cells in cases.values() for m in cells})
    return table(["M ="] + [f"{m:,}" for m in rows_of_x],
                 [[f"{direction} {shape}"] + [cells.get(m, "-") for m in rows_of_x]
                  for (direction, shape), cells in cases.items()])


def kernel_table(raw, file, prefixes, rate):
    """One row per case: our time, rate and share of the ceiling, and the peers' times."""
    cases = {prefix + case: found for prefix in prefixes
             for case, found in by_case(raw, file, prefix).items()}
    names = sorted({name for found in cases.values() for name in found} - {"qlab"})
    share = {"GB/s": "copy_percent", "TFLOP/s": "product_percent"}[rate]
    rows = []
    for case, found in cases.items():
        ours = found.get("qlab", {})
        if "error" in ours:
            rows.append([case, ours["error"], "", "", ""] + [""] * len(names))
            continue
        rows.append([case, shown(ours.get("us")), f"{ours.get('noise_percent', 0):.1f} %",
                     shown(ours.get(rate)), f"{ours.get(share, 0):.0f} %"] +
                    [shown(found.get(name, {}).get("us")) for name in names])
    return table(["case", "us", "noise", rate, "of ceiling"] + [f"{n}, us" for n in names], rows)


def lora_table(raw):
    """One row per shape, tokens and rank: both implementations, over the module without adapter of
    the same call."""
    bases = {(row["name"], row["call"]): row.get("us")
             for row in raw.get("kernels", {}).get("ours", []) if row["name"].endswith("/r0/base")}
    rows = {}
    for case, found in by_case(raw, "kernels", "lora/").items():
        direction, shape, m, rank = case.split("/")
        if rank == "r0":
            continue
        row = rows.setdefault((shape, m[1:], rank[1:]), {})
        for name, result in found.items():
            base = bases.get((f"lora/{direction}/{shape}/{m}/r0/base", result["call"]))
            over = f" ({result['us'] / base:.2f})" if base and "us" in result else ""
            row[direction, name] = result.get("error") or shown(result["us"]) + over
    columns = [(d, n) for d in ("forward", "both") for n in ("folded", "separate")]
    return table(["shape", "tokens", "r"] + [f"{d}, {n}" for d, n in columns],
                 [list(key) + [row.get(column, "-") for column in columns]
                  for key, row in rows.items()])


def ceiling_table(raw):
    """One column per call that measured them."""
    calls, names = [], {}
    for file in ("kernels", "linear", "attention"):
        for row in raw.get(file, {}).get("ours", []):
            if row["name"].startswith("ceiling/"):
                call = (file, row["call"], raw[file]["calls"][row["call"]]["date"])
                calls += [call] if call not in calls else []
                unit = "GB/s" if "GB/s" in row else "TFLOP/s"
                names.setdefault(row["name"].removeprefix("ceiling/"), {})[call] = (
                    f"{shown(row[unit])} {unit}")
    return table(["ceiling"] + [f"{file}, {date[:16]}" for file, _, date in calls],
                 [[name] + [found.get(call, "-") for call in calls]
                  for name, found in names.items()])


def tables(raw, entries, memory_runs, budget_runs):
    return {
        "headline": headline_table(entries),
        "step": step_table(raw) + "\n\n" + provenance(raw, "step"),
        "long": long_table(raw) + "\n\n" + provenance(raw, "long"),
        "paging": paging_table(raw),
        "cpu": cpu_table(raw) + "\n\n" + provenance(raw, "cpu_step"),
        "ceilings": ceiling_table(raw) + "\n\n" + provenance(raw, "kernels"),
        "linear": linear_table(raw) + "\n\n" + provenance(raw, "linear"),
        "linear-best": best_linear_table(raw),
        "product": product_table(raw) + "\n\n" + provenance(raw, "product"),
        "nf4": kernel_table(raw, "kernels", ("dequantize/", "quantize/"),
                            "GB/s"),
        "attention": kernel_table(raw, "attention", ("attention/",), "TFLOP/s") + "\n\n" +
                     provenance(raw, "attention"),
        "lora": lora_table(raw),
        "other": kernel_table(raw, "kernels", ("rms_norm/", "swiglu/", "rope/", "cross_entropy/",
                                               "adamw/"), "GB/s"),
        "budget": memory_report.budget_table(budget_runs, table),
        "memory": memory_report.memory_table(memory_runs, table),
    }


def replace_tables(text, new):
    for name, content in new.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        text, count = pattern.subn(lambda m: m[1] + content.strip() + "\n" + m[2], text)
        if count != 1:
            sys.exit(f"docs/performance.md has {count} places for the table {name}")
    return text


def replace_file(path, text):
    """As a whole: a killed report leaves the older one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=headline.RESULTS)
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs")
    options = parser.parse_args()
    if not options.results.is_dir():
        sys.exit(f"{options.results} is not there: `make gpu-bench` writes it")
    raw = headline.load(options.results)
    entries = headline.headline(raw)
    memory_runs, budget_runs = (memory.read_results(options.results / f"{name}.json")
                                for name in ("memory", "budget"))
    content = tables(raw, entries, memory_runs, budget_runs)
    # Written when all is known: what cannot be read leaves the older report whole.
    files = {options.results / "headline.json": json.dumps(entries, indent=1) + "\n"}

    def show(name, svg, title):
        files[options.docs / f"performance-{name}.svg"] = svg
        content[name] = f"![{title}](performance-{name}.svg)\n\n{content[name]}"

    rows = linear_rows(raw)
    if rows:
        device = raw["linear"]["calls"][-1]["gpu"].get("name") or "GPU"
        show("linear", crossover.plot(rows, f"NF4 linear layer on {device}"),
             "Time over dense bf16 against M")
    budgets = memory_report.budget_plot(budget_runs)
    if budgets:
        show("budget", budgets, "Tokens per second against the memory budget")
    page = options.docs / "performance.md"
    files[page] = replace_tables(page.read_text(), content)
    for path, text in files.items():
        replace_file(path, text)
    met = sum(entry["met"] for entry in entries)
    print(f"{met} of {len(entries)} targets met; {options.results / 'headline.json'}, {page}")


if __name__ == "__main__":
    main()
