"""Recomputes every ratio of bench/results/headline.json from the raw files it names.

Fails when a raw file or row is missing, when a figure disagrees, or when the headline is older than
the raw files or bench/targets.json.
"""

import json
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import headline

KEYS = ("name", "ours", "peer", "ratio", "target", "met", "reason", "next", "unit", "commit",
        "date", "device")


def figure(results, source):
    """The value that an entry's source points to, in the headline's unit."""
    path = results / source["file"]
    if not path.exists():
        raise ValueError(f"{path} is missing")
    raw = headline.in_one_form(path.stem, json.loads(path.read_text()))
    rows = [row for row in raw[source["side"]] if row["name"] == source["name"] and
            row["call"] == source["call"]]
    if len(rows) != 1:
        raise ValueError(f"{path} has {len(rows)} rows {source['name']}")
    return rows[0][source["field"]] * headline.SCALES.get(source["field"], 1)


def close(a, b):
    return (a is None and b is None) or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-9))


def check(entry, results):
    missing = [key for key in KEYS if key not in entry]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    values = {side: entry["from"][side] and figure(results, entry["from"][side])
              for side in ("ours", "peer")}
    for side, value in values.items():
        if not close(value, entry[side]):
            raise ValueError(f"{side} is {entry[side]}, the raw file says {value}")
    ours, peer = values["ours"], values["peer"]
    ratio = None
    if entry["formula"] == "median of pairs":
        ratio = figure(results, entry["from"]["ours"] | {"field": "over_beside"})
    elif ours is not None and peer is not None:
        ratio = ours / peer if entry["formula"] == "ours/peer" else peer / ours
    if not close(ratio, entry["ratio"]):
        raise ValueError(f"ratio is {entry['ratio']}, recomputed {ratio}")
    value = ours if entry["compare"] == "ours" else ratio
    fits = value is not None and (value >= entry["target"] if entry["bound"] == "at least"
                                  else value <= entry["target"])
    if entry["met"] and not fits:
        raise ValueError(f"{value} does not meet {entry['bound']} {entry['target']}")
    if not entry["met"] and not entry["reason"]:
        raise ValueError("is missed without a reason (bench/targets.json)")
    if not entry["met"] and not entry["next"]:
        raise ValueError("is missed without a next step (bench/targets.json)")


def main():
    results = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else headline.RESULTS
    path = results / "headline.json"
    if not path.exists():
        print(f"{path} is missing (make gpu-bench writes it)")
        return 1
    entries, wrong = json.loads(path.read_text()), 0
    for entry in entries:
        try:
            check(entry, results)
        except (KeyError, TypeError, ValueError) as error:
            wrong += 1
            print(f"{entry.get('name')}: {error}")
    if entries != json.loads(json.dumps(headline.headline(headline.load(results)))):
        wrong += 1
        print("the headline is not what bench/report.py makes of the raw files: run it again")
    print(f"headline: {len(entries)} entries, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
