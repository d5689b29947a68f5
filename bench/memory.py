"""Measured memory: `qlab sweep` on the rows of bench/memory_rows.json, into bench/results.

    python bench/memory.py [--qlab build/qlab] [--filter REGEX] [--seconds N] [--device cuda]

Rows of one model and quantization are one sweep, so that its base is loaded once; each row is a
gang of its own. memory.json has them in the layout of experiments/memory_results.h, budget.json
those of the group `budget` with their step times. A row replaces the older one of the same model
and settings; one that fails, or for which the seconds do not suffice, leaves it as it is.

Said of each row: whether the allocator's peaks, of loading and of training, are the predicted ones
to the byte; and whether what the GPU had in use at the peak, less what other programs have, is
within 1 % of the prediction and the context together. The context (driver, libraries, kernels'
code) is what the first row of the file had in use beyond the allocator's bytes.

Ends with 1 when a prediction was not met to the byte or a row failed.
"""

import argparse
import collections
import datetime
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import gpu_state
import measure

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = ROOT / "bench/memory_rows.json"
BUDGET = "budget"  # the group whose speed counts too
MEMORY_STEPS, BUDGET_STEPS = 3, 13
MIB = 1 << 20
SCRATCH = 24 << 30  # bytes
DEVICE_SHARE = 0.01
RUN_KEYS = {"data.train": "synthetic", "train.save_every": 0}
NEEDED = ("model", "set", "device", "commit", "date", "peak_bytes", "predicted_bytes",
          "training_peak_bytes", "predicted_training_bytes", "load_peak_bytes",
          "predicted_load_bytes", "device_used_bytes")


TEXTS = ("name", "model", "device", "commit", "date")

Group = collections.namedtuple("Group", "name model rows device_memory", defaults=[None])


def load_rows(path):
    """Groups of rows, each row its settings; device_memory: of --device-memory, None without."""
    return [Group(group["name"], group["model"],
                  [group.get("set", {}) | row for row in group["rows"]],
                  group.get("device_memory"))
            for group in json.loads(pathlib.Path(path).read_text())]


def reference_row(groups=None):
    """(model, settings) of the run that the context is measured with: the first of the file."""
    first = (groups or load_rows(ROWS))[0]
    return first.model, first.rows[0]


def chosen_rows(groups, pattern):
    """Those whose group, model or settings the expression finds."""
    found = []
    for group in groups:
        rows = [row for row in group.rows
                if re.search(pattern, f"{group.name} {group.model} {json.dumps(row)}")]
        if rows:
            found.append(group._replace(rows=rows))
    return found


def trials_of(row):
    return row.get("parallel.trials_per_gpu", 1)


def sweep_file(name, model, rows):
    """The rows as a sweep (JSON is YAML). The trials of a gang differ in what takes no memory."""
    keys = RUN_KEYS | {"model.path": model,
                       "train.steps": BUDGET_STEPS if name == BUDGET else MEMORY_STEPS}
    blocks = measure.nested(keys) | {"lora": {}}
    points = [row | {"optim.lr": 1e-4 * (i + 1)} for row in rows for i in range(trials_of(row))]
    return {"name": name, "base": blocks, "paired": points}


def used_by_others():
    """Bytes in use on the GPU before anything of ours runs."""
    used = gpu_state.query("memory.used")["memory.used"]
    return int(used * MIB) if isinstance(used, float) else 0


def used_at_peak(lines, peak):
    """(device_used, total) of the sample with the most in use among those within 0.1 % or 1 MiB of
    the allocator's peak: small blocks come and go inside a step, where no sample is taken. None
    without one, or where no device reports."""
    near = [(line["device_used"], line["total"]) for line in lines
            if line.get("device_used") and not line.get("shared") and
            peak - line["total"] <= max(peak // 1000, MIB)]
    return max(near, default=None)


def beyond(lines, others):
    """{phase: bytes in use beyond the allocator's when it ended}: what loading adds there is lost
    between blocks, since the driver hands out whole pages."""
    return {line["phase"]: line["device_used"] - others - line["total"] for line in lines
            if line.get("device_used")}


def read_lines(path):
    """The lines of memory.jsonl that read."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def paging_of(status):
    """What the optimizer's pages cost; nothing where there are none."""
    paging = status.get("paging")
    return {} if paging is None else {
        "state_bytes": paging["state_bytes"], "host_bytes": paging["host_bytes"],
        "moved_bytes": paging["moved_bytes"], "step_moved_bytes": paging["step_moved_bytes"],
        "step_stalled_seconds": paging["step_stalled_seconds_median"]}


def entry_of(model, row, status, lines, others, origin):
    """What a finished trial says of its gang."""
    training, loading = status["peak_bytes"], status["load_peak_bytes"]
    predicted = status["predicted_peak_bytes"], status["predicted_load_peak_bytes"]
    used, held = used_at_peak(lines, training) or (0, 0)
    entry = {"model": model, "set": row, "device": status["device"]} | origin
    entry |= {"peak_bytes": max(training, loading), "predicted_bytes": max(predicted),
              "training_peak_bytes": training, "predicted_training_bytes": predicted[0],
              "load_peak_bytes": loading, "predicted_load_bytes": predicted[1],
              "device_used_bytes": max(used - others, 0),
              "categories": status["peak_bytes_by_category"]}
    if used:
        entry |= {"context_bytes": used - others - held, "beyond_bytes": beyond(lines, others)}
    return entry | paging_of(status)


def speed_of(row, status):
    tokens = trials_of(row) * row["train.batch_size"] * row["data.seq_len"]
    seconds = status["step_seconds_median"]
    return {"plan": status["plan"], "step_tokens": tokens, "step_seconds": seconds,
            "predicted_step_seconds": status["predicted_step_seconds"],
            "tokens_per_s": tokens / seconds}


def context_of(entries, device, reference):
    """Bytes of the context: of the reference row on that device, (model, settings)."""
    for entry in entries:
        if key_of(entry) == key_of({"model": reference[0], "set": reference[1]}) and \
                entry["device"] == device:
            return entry.get("context_bytes")
    return None


def byte_equal(entry):
    return (entry["training_peak_bytes"] == entry["predicted_training_bytes"] and
            entry["load_peak_bytes"] == entry["predicted_load_bytes"])


def device_ratio(entry, context):
    """The GPU's own figure over prediction and context; None without one of them."""
    if not entry["device_used_bytes"] or context is None:
        return None
    return entry["device_used_bytes"] / (entry["predicted_training_bytes"] + context)


def device_agrees(entry, context):
    """Whether the GPU's own figure is within 1 % of prediction and context; None where one of them
    is not known."""
    ratio = device_ratio(entry, context)
    return None if ratio is None else abs(ratio - 1) <= DEVICE_SHARE


def key_of(entry):
    return (entry["model"], json.dumps(entry["set"], sort_keys=True), entry.get("device_memory"))


def merged(old, new):
    """New entries in the place of older ones of the same model and settings."""
    fresh = {key_of(entry): entry for entry in new}
    result = [fresh.pop(key_of(entry), entry) for entry in old]
    return result + [entry for entry in new if key_of(entry) in fresh]


def read_results(path, needed=NEEDED):
    """The entries of a file, none where it is not there. What is not of this layout is not
    overwritten."""
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except ValueError as error:
        sys.exit(f"{path}: not read: {error}; move it away to measure anew")
    if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and all(key in entry for key in needed) for entry in entries):
        sys.exit(f"{path}: not a list of measured runs; move it away to measure anew")
    for entry in entries:
        wrong = [key for key, value in entry.items() if not (
            isinstance(value, str) if key in TEXTS else
            type(value) in (int, float) and math.isfinite(value)
            if key in needed and key.endswith("_bytes") else True)]
        if wrong:
            sys.exit(f"{path}: {wrong[0]} of a run is {entry[wrong[0]]!r}; move the file away to "
                     "measure anew")
    return entries


def write_results(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n " + ",\n ".join(map(json.dumps, entries)) + "\n]\n")
    os.replace(temporary, path)


def scratch_parent():
    """In memory where there is room: the state that each trial saves takes up to 8 GB."""
    shared = pathlib.Path("/dev/shm")
    roomy = shared.is_dir() and os.access(shared, os.W_OK) and \
        shutil.disk_usage(shared).free > SCRATCH
    return shared if roomy else None


def run_sweep(options, folder, sweep, device_memory, seconds):
    """Runs until it ends or its time is up; returns its output."""
    config = folder / "sweep.yaml"
    config.write_text(json.dumps(sweep))
    with open(folder / "log.txt", "w+") as log:
        limit = ["--device-memory", device_memory] if device_memory else []
        process = subprocess.Popen([options.qlab, "sweep", config, "--device", options.device,
                                    "--out", folder / "out", *limit], stdout=log, stderr=log)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # ends between two steps
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.seek(0)
        return log.read()


def trial_folders(qlab, out):
    """Of the trials in the order of the sweep file; none when nothing has finished."""
    listed = subprocess.run([qlab, "memory", "--check", out, "--json"], capture_output=True,
                            text=True)
    if listed.returncode not in (0, 1):
        return []
    return [out / "trials" / trial["directory"] for trial in json.loads(listed.stdout)["trials"]]


def measure_group(options, group, origin, seconds):
    """(entries, failures, number of rows left out) of a group; its files are gone afterwards."""
    name, model, rows, device_memory = group
    entries, failures, left_out = [], [], 0
    others = used_by_others() if options.device == "cuda" else 0
    with tempfile.TemporaryDirectory(dir=scratch_parent()) as folder:
        folder = pathlib.Path(folder)
        output = run_sweep(options, folder, sweep_file(name, model, rows), device_memory,
                           seconds)
        trials = trial_folders(options.qlab, folder / "out")
        if not trials:
            tail = " | ".join(output.strip().splitlines()[-3:])
            return [], [f"{name}: no trial finished: {tail}"], 0
        for row in rows:
            own, trials = trials[:trials_of(row)], trials[trials_of(row):]
            status = [json.loads((path / "status.json").read_text())
                      if (path / "status.json").exists() else {} for path in own]
            bad = [s["error"] for s in status if s.get("error")]
            if bad or not all(s.get("status") == "finished" for s in status):
                left_out += not bad
                failures += [f"{name} {json.dumps(row)}: {text}" for text in bad[:1]]
                continue
            entry = entry_of(model, row, status[0], read_lines(own[0] / "memory.jsonl"), others,
                             origin)
            if device_memory:
                entry["device_memory"] = device_memory
            entries.append(entry | (speed_of(row, status[0]) if name == BUDGET else {}))
    return entries, failures, left_out


def difference_text(entry):
    """"training +256 B, loading +0 B": measured less predicted."""
    training = entry["training_peak_bytes"] - entry["predicted_training_bytes"]
    loading = entry["load_peak_bytes"] - entry["predicted_load_bytes"]
    return f"training {training:+,} B, loading {loading:+,} B"


def verdict(entry, context):
    """One line on a row."""
    agrees, ratio = device_agrees(entry, context), device_ratio(entry, context)
    text = [f"{entry['model']} {json.dumps(entry['set'])}: peak {entry['peak_bytes']:,} B",
            "as predicted" if byte_equal(entry) else f"NOT AS PREDICTED: {difference_text(entry)}"]
    if agrees is None:
        text.append("the device's own figure is not known")
    else:
        text.append(f"the GPU's own figure is {ratio - 1:+.2%} off prediction and context" +
                    ("" if agrees else ", MORE THAN 1 %"))
    if "tokens_per_s" in entry:
        text.append(f"{entry['tokens_per_s']:,.0f} tokens/s, {entry['step_seconds']:.3f} s a step, "
                    f"predicted {entry['predicted_step_seconds']:.3f}")
    return "; ".join(text)


def device_facts(qlab):
    """Of the GPU: all its memory as nvidia-smi has it, and what of it the runtime calls its own."""
    asked = subprocess.run([qlab, "memory", "synthetic:tiny", "--device", "cuda", "--json"],
                           capture_output=True, text=True)
    total = gpu_state.query("memory.total")["memory.total"]
    if asked.returncode != 0 or not isinstance(total, float):
        return {}
    return {"memory_mib": int(total), "runtime_bytes": json.loads(asked.stdout)["memory_bytes"]}


def report_context(entries, reference):
    """What a person copies into experiments/gpus.cpp: MiB that no allocation can have."""
    for entry in entries:
        if key_of(entry) != key_of({"model": reference[0], "set": reference[1]}) or \
                not {"context_bytes", "memory_mib"} <= entry.keys():
            continue
        reserved = entry["memory_mib"] * MIB - entry["runtime_bytes"]
        taken = -(-(entry["context_bytes"] + reserved) // MIB)
        print(f"{entry['device']}: context {entry['context_bytes']:,} B, reserved by the driver "
              f"{reserved:,} B; for experiments/gpus.cpp: {taken} MiB of {entry['memory_mib']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--rows", default=str(ROWS))
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench/results")
    parser.add_argument("--filter", default="", type=measure.regular_expression,
                        help="only rows that this expression finds")
    parser.add_argument("--seconds", type=float, default=400, help="nothing is begun after them")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    groups = load_rows(options.rows)
    if not chosen_rows(groups, options.filter):
        sys.exit(f"no row that '{options.filter}' finds; it is looked for in a row's group, model and "
                 f"settings; the groups are {', '.join(sorted({group.name for group in groups}))}")
    reference = reference_row(groups)
    files = {True: options.results / "budget.json", False: options.results / "memory.json"}
    known = {kind: read_results(path) for kind, path in files.items()}
    facts = device_facts(options.qlab) if options.device == "cuda" else {}
    commit = measure.qlab_commit(options.qlab)
    failures, measured, equal, agreeing, left_out = [], 0, 0, 0, 0
    for group in chosen_rows(groups, options.filter):
        begin = time.monotonic()
        if begin >= end:
            left_out += len(group.rows)
            continue
        origin = facts | {"commit": commit,
                  "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
        entries, failed, missing = measure_group(options, group, origin, end - begin)
        kind = group.name == BUDGET
        known[kind] = merged(known[kind], entries)
        if entries:
            write_results(files[kind], known[kind])
        for entry in entries:
            context = context_of(known[False], entry["device"], reference)
            print(verdict(entry, context), flush=True)
            equal += byte_equal(entry)
            agreeing += device_agrees(entry, context) is True
        measured += len(entries)
        failures += failed
        left_out += missing
        print(f"{group.name}: {len(entries)} of {len(group.rows)} rows in "
              f"{time.monotonic() - begin:.1f} s", flush=True)
    report_context(known[False], reference)
    print(f"{equal} of {measured} rows took what was predicted, to the byte; of {agreeing} the "
          f"GPU's own figure is within 1 %; {left_out} left out, the time being up")
    for text in failures:
        print(f"FAILED {text}", file=sys.stderr)
    sys.exit(1 if failures or equal < measured else 0)


if __name__ == "__main__":
    main()
