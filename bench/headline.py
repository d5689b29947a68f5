"""The headline figures: bench/targets.json against the raw files in bench/results.

A target names what is ours and what it is set beside:
  cases    placeholders and their values; the worst case over all of them is the figure
  ours     {file, name, field[, not]}: the best row of that name; * stands for one or more parts of
           it, `not` lists implementations that do not count
  peer     the same, or a list of them: the strongest counts; {"self": ...} looks among our own rows
  ratio    "ours/peer" (default) or "peer/ours"
  compare  "ratio" (default) or "ours": what the target bounds
  bound    "at least" or "at most"
  within   a field of which ours may not have more than the peer
  reason, next   kept by hand, shown while the target is missed

Rows of ours that were timed in turns with what they are set beside (over_beside: the median of the
pairs' ratios) take the place of a ratio of two rows.
"""

import fnmatch
import itertools
import json
import pathlib
import sys

import measure
import memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
# Less is better.
TIMES = ("us", "step_seconds", "peak_bytes", "seconds", "start_seconds", "over_beside")
SCALES = {"peak_bytes": 1e-9}
NEEDED_OF_LONG = ("name", "commit", "date", "device")


def cpu_rows(raw):
    """bench/cpu_step.py's file in the form of the others."""
    call = {"commit": raw["commit"], "date": raw["date"], "gpu": {"name": raw["cpu"]}}
    rows = {"qlab": [], "peft": []}
    for shape in raw["shapes"]:
        for side, found in rows.items():
            found.append({"name": f"cpu-smollm2-{shape['batch']}x{shape['length']}/{side}",
                          "tokens_per_s": shape[side]["tokens_per_s"],
                          "step_seconds": shape[side]["median_s"], "call": 0})
    return {"calls": [call], "ours": rows["qlab"], "peers": rows["peft"]}


def memory_rows(entries):
    """bench/memory.py's file in the form of the others: how far the GPU's own figure and the
    prediction with its context are apart, the larger over the smaller, and the share of all rows
    whose peaks are the predicted ones to the byte."""
    calls, rows = [], []
    for i, entry in enumerate(entries):
        context = memory.context_of(entries, entry["device"], memory.reference_row())
        ratio = memory.device_ratio(entry, context)
        if ratio is None:
            continue
        call = {"commit": entry["commit"], "date": entry["date"], "gpu": {"name": entry["device"]}}
        calls += [call] if call not in calls else []
        rows.append({"name": f"memory/{i}", "device_ratio": max(ratio, 1 / ratio),
                     "call": calls.index(call)})
    if entries:
        equal = sum(map(memory.byte_equal, entries)) / len(entries)
        last = entries[-1]
        calls.append({"commit": last["commit"], "date": last["date"],
                      "gpu": {"name": last["device"]}})
        rows.append({"name": "memory/all", "equal_share": equal, "call": len(calls) - 1})
    return {"calls": calls, "ours": rows}


def read_cpu(path):
    """bench/cpu_step.py's file."""
    try:
        raw = json.loads(path.read_text())
        cpu_rows(raw)
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not read: {type(error).__name__}: {error}; bench/cpu_step.py writes it")
    return raw


def long_rows(entries):
    """bench/long.py's file in the form of the others; what one commit gave on one device is a call,
    since two such runs do not fit into the minutes of one."""
    calls, rows = {}, []
    for entry in sorted(entries, key=lambda entry: entry["date"]):
        calls[entry["commit"], entry["device"]] = {
            "commit": entry["commit"], "date": entry["date"], "gpu": {"name": entry["device"]}}
        rows.append((entry, list(calls).index((entry["commit"], entry["device"]))))
    found = {(entry["name"], call): entry for entry, call in rows}
    return {"calls": list(calls.values()),
            "ours": [entry | {"name": entry["name"] + "/qlab", "call": call} |
                     added_by_pages(entry, found.get((entry.get("beside"), call)))
                     for entry, call in rows]}


def added_by_pages(entry, beside):
    """What pages add to a step, and the bytes on the host over that: the rate in each direction of
    the bus, both at once. `beside`: the same run without pages, None where it is not known."""
    if not beside or "host_bytes" not in entry:
        return {}
    added = entry["step_seconds"] - beside["step_seconds"]
    rate = {"GB/s": 1e-9 * entry["host_bytes"] / added} if entry["host_bytes"] and added > 0 else {}
    return {"added_seconds": added} | rate


def step_rows(raw):
    """The file of steps; a gang's rows tell whether the run alone, where the same call had it for as
    many steps, left the adapter of one of the gang's trials, to the bit."""
    def steps(row):
        config = row.get("config", {})
        return config.get("base", config).get("train", {}).get("steps")
    rows = []
    for row in raw["ours"]:
        name = row["name"].split("/")[0].rsplit("-gang", 1)
        alone = [other for other in raw["ours"] if len(name) == 2 and "adapter_sha256" in row and
                 other["name"].split("/")[0] == name[0] and other["call"] == row["call"] and
                 "adapter_sha256" in other and steps(other) == steps(row)]
        equal = all(set(other["adapter_sha256"]) <= set(row["adapter_sha256"]) for other in alone)
        rows.append(row | ({"as_alone": int(equal)} if alone else {}))
    return raw | {"ours": rows}


def load(results=RESULTS):
    """The raw files by name; those that do not exist are left out."""
    raw = {}
    for name in ("step", "kernels", "linear", "product", "attention", "cpu_step", "memory", "long"):
        path = pathlib.Path(results) / f"{name}.json"
        if path.exists():
            raw[name] = in_one_form(name, READERS.get(name, measure.read_results)(path))
    return raw


def read_long(path):
    return memory.read_results(path, NEEDED_OF_LONG)


READERS = {"cpu_step": read_cpu, "memory": memory.read_results, "long": read_long}


def in_one_form(name, raw):
    form = {"cpu_step": cpu_rows, "step": step_rows, "memory": memory_rows, "long": long_rows}.get(name)
    return form(raw) if form else raw


def best(raw, side, query, values, limit=None, call=None):
    """The best row that the query finds, with its file; None when there is none. `limit`: a field
    and its largest value; `call`: only rows of that call."""
    found = []
    file = query["file"]
    pattern, field = query["name"].format(**values), query["field"]
    for row in raw.get(file, {}).get(side, []):
        if field not in row or row["name"].split("/")[-1] in query.get("not", []):
            continue
        if limit and row.get(limit[0], float("inf")) > limit[1]:
            continue
        if call is not None and row["call"] != call:
            continue
        if fnmatch.fnmatchcase(row["name"], pattern):
            found.append((row[field], row))
    if not found:
        return None
    value, row = (min if field in TIMES else max)(found, key=lambda pair: pair[0])
    return {"value": value * SCALES.get(field, 1), "row": row, "file": file, "side": side,
            "field": field}


def strongest(raw, queries, values, call):
    queries = queries if isinstance(queries, list) else [queries]
    found = [best(raw, "ours" if "self" in q else "peers", q.get("self", q), values, call=call)
             for q in queries]
    found = [peer for peer in found if peer]
    if not found:
        return None
    return (min if found[0]["field"] in TIMES else max)(found, key=lambda peer: peer["value"])


def ratio_of(kind, ours, peer):
    if ours is None or peer is None:
        return None
    return ours / peer if kind == "ours/peer" else peer / ours


def within_bound(bound, value, target):
    return value >= target if bound == "at least" else value <= target


def source(found):
    return found and {"file": f"{found['file']}.json", "side": found["side"],
                      "name": found["row"]["name"], "call": found["row"]["call"],
                      "field": found["field"]}


def in_pairs(raw, target, values, call):
    """The best of our rows that were timed in turns with the other side; None without any."""
    found = best(raw, "ours", target["ours"] | {"field": "over_beside"}, values, call=call)
    if found is None:
        return None
    row = found["row"]
    return {"value": found["value"], "ours": found | {"field": "us", "value": row["us"]},
            "peer": found | {"field": "beside_us", "value": row["beside_us"]},
            "ratio": found["value"], "formula": "median of pairs"}


def sides(raw, target, values, call):
    """Ours and the peer of one call (None: of any)."""
    pairs = in_pairs(raw, target, values, call)
    if pairs:
        return pairs
    ours = best(raw, "ours", target["ours"], values, call=call)
    peer = strongest(raw, target["peer"], values, call) if "peer" in target else None
    if "within" in target and ours and peer:
        limit = (target["within"], peer["row"][target["within"]])
        ours = best(raw, "ours", target["ours"], values, limit, call)
    ratio = ratio_of(target.get("ratio", "ours/peer"), ours and ours["value"],
                     peer and peer["value"])
    value = ours and ours["value"] if target.get("compare") == "ours" else ratio
    return {"value": value, "ours": ours, "peer": peer, "ratio": ratio,
            "formula": target.get("ratio", "ours/peer")}


def one_case(raw, target, values):
    """Only a ratio of two sides of one call means anything: of the latest call that has both."""
    nothing = {"value": None, "ours": None, "peer": None, "ratio": None,
               "formula": target.get("ratio", "ours/peer")}
    if "ours" not in target:
        return nothing
    calls = raw.get(target["ours"]["file"], {}).get("calls", [])
    found = [sides(raw, target, values, call)
             for call in (reversed(range(len(calls))) if "peer" in target else [None])]
    return next((case for case in found if case["value"] is not None), nothing)


def how_to_measure(target):
    """The command that measures a target's cases and those of ours that they are set beside."""
    if "ours" not in target:
        return ""
    file = target["ours"]["file"]
    if file == "cpu_step":
        return "python bench/cpu_step.py"
    if file == "memory":
        return "make gpu-bench PART=memory"
    peers = target.get("peer", [])
    peers = peers if isinstance(peers, list) else [peers]
    queries = [target["ours"]] + [query["self"] for query in peers if "self" in query]
    names = {query["name"].rsplit("/", 1)[0] for query in queries} - {"ceiling"}
    names = sorted(name for name in names
                   if not any(other != name and other in name for other in names))
    for key, values in target.get("cases", {}).items():
        values = list(map(str, values))
        text = values[0] if len(values) == 1 else "(" + "|".join(values) + ")"
        names = [name.replace(f"{{{key}}}", text) for name in names]
    return f"make gpu-bench PART={file} FILTER='{'|'.join(names)}'"


def entry_of(raw, target):
    keys = list(target.get("cases", {}))
    cases = [one_case(raw, target, dict(zip(keys, values)))
             for values in itertools.product(*target.get("cases", {}).values())]
    measured = [case for case in cases if case["value"] is not None]
    worst = cases[0]
    if measured:
        pick = min if target["bound"] == "at least" else max
        worst = pick(measured, key=lambda case: case["value"])
    met = (len(measured) == len(cases) and
           within_bound(target["bound"], worst["value"], target["target"]))
    ours, peer = worst["ours"], worst["peer"]
    call = raw[ours["file"]]["calls"][ours["row"]["call"]] if ours else {}
    reason, ideas = ("", "") if met else (target.get("reason", ""), target.get("next", ""))
    if len(measured) < len(cases):
        count = f"{len(measured)} of {len(cases)} cases" if measured else "not"
        reason = f"{count} measured yet. {reason}".strip()
        ideas = ". ".join(text for text in (how_to_measure(target), ideas) if text)
    return {"name": target["name"], "ours": ours and ours["value"],
            "peer": peer and peer["value"], "ratio": worst["ratio"], "target": target["target"],
            "bound": target["bound"], "compare": target.get("compare", "ratio"), "met": met,
            "reason": reason, "next": ideas,
            "unit": target["unit"], "commit": call.get("commit"), "date": call.get("date"),
            "device": call.get("gpu", {}).get("name"),
            "formula": worst["formula"],
            "from": {"ours": source(ours), "peer": source(peer)}}


def headline(raw):
    targets = json.loads((ROOT / "bench/targets.json").read_text())
    return [entry_of(raw, target) for target in targets]
