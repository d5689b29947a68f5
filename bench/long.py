"""Runs that take a whole card or long: bench/long_rows.json, into bench/results/long.json.

    python bench/long.py [--qlab build/qlab] [--filter REGEX] [--seconds N] [--device cuda]

Each row is one command within a time limit, the cheapest first:
  train    `qlab train`: seconds from its start to the end of the first step, status.json's median
           step (which leaves out the first three; of fewer steps their mean), the allocator's
           highest total, and of paged optimizer states the bytes moved and how long the step
           waited for them
  memory   `qlab memory`: seconds until it has answered, the median of three calls
A row with `beside` names the one that its optimizer's pages are set beside: the same run without.
A row with `checkpoint` reads 16-bit weights from files that were just written, so that they are in
the page cache; they are of random values, and have as many positions as the row's sequences need.

A finished row takes the place of the older one of its name; one that fails, or for which the
seconds do not suffice, leaves it as it is. Ends with 1 when a row failed.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import checkpoint
import cpu_step
import headline
import measure
import memory
import steps

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = ROOT / "bench/long_rows.json"


class Failed(Exception):
    pass


def train(options, row, model, folder):
    config = folder / "run.yaml"
    config.write_text(json.dumps(measure.nested(row["set"] | {"model.path": model})))
    command = ["timeout", str(row["limit"]), options.qlab, "train", config, "--device",
               options.device, "--out", folder / "out"]
    if "device_memory" in row:
        command += ["--device-memory", row["device_memory"]]
    with open(folder / "log.txt", "w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        arrivals = steps.lines_as_they_come(process, folder)
        log.seek(0)
        text = " | ".join(log.read().strip().splitlines()[-3:])
    found = next(folder.glob("out/trials/*/status.json"), None)
    status = json.loads(found.read_text()) if found else {}
    if process.returncode != 0 or status.get("status") != "finished":
        late = process.returncode == 124
        raise Failed(f"not done after {row['limit']} s" if late else status.get("error") or text)
    keys = row["set"]
    tokens = keys["train.batch_size"] * keys["data.seq_len"] * keys.get("train.grad_accum", 1)
    step = status.get("step_seconds_median") or status["seconds"] / status["steps"]
    return {"tokens": keys["data.seq_len"], "step_tokens": tokens, "step_seconds": step,
            "tokens_per_s": tokens / step, "start_seconds": arrivals[0] - begin,
            "seconds": time.perf_counter() - begin,
            "peak_bytes": max(status["peak_bytes"], status["load_peak_bytes"]),
            "predicted_bytes": max(status["predicted_peak_bytes"],
                                   status["predicted_load_peak_bytes"]),
            "plan": status.get("plan"), "device": status["device"]} | memory.paging_of(status)


def ask_memory(options, row, model, folder):
    command = [options.qlab, "memory", model, "--gpu", row["gpu"], "--json"]
    for key, value in row["set"].items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, timeout=row["limit"])
        seconds.append(time.perf_counter() - begin)
        if result.returncode != 0:
            raise Failed(result.stderr.strip())
    return {"seconds": statistics.median(seconds), "device": cpu_step.cpu_model(),
            "predicted_bytes": json.loads(result.stdout)["peak_bytes"]}


def measured(options, row, end):
    """The row's entry in the results; the command ends at `end` at the latest."""
    name = row["name"]
    with tempfile.TemporaryDirectory(dir=memory.scratch_parent()) as folder:
        folder = pathlib.Path(folder)
        model = row.get("model")
        if "checkpoint" in row:
            model = str(folder / "model")
            checkpoint.write(folder / "model", row["checkpoint"], row["set"]["data.seq_len"])
        row["limit"] = min(row["limit"], max(1, int(end - time.monotonic())))
        run = {"train": train, "memory": ask_memory}[row["command"]]
        entry = {"name": name, "commit": options.commit,
                 "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        try:
            entry |= run(options, row, model, folder)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {row['limit']} s") from None
        return entry | {key: row[key] for key in ("model", "checkpoint", "device_memory", "beside", "set")
                        if key in row}


def merged(old, entry):
    return [known for known in old if known["name"] != entry["name"]] + [entry]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--rows", type=pathlib.Path, default=ROWS)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench/results")
    parser.add_argument("--filter", default="", type=measure.regular_expression,
                        help="only rows whose name this finds")
    parser.add_argument("--seconds", type=float, default=420,
                        help="no row begins whose limit reaches beyond them, but the first")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    end, path = time.monotonic() + options.seconds, options.results / "long.json"
    options.commit = measure.qlab_commit(options.qlab)
    headline.read_long(path)  # what cannot be read is said before minutes are spent
    failed, begun = 0, 0
    for row in measure.found_rows(options.rows, options.filter):
        left = end - time.monotonic()
        if left <= 0 or (begun and left < row["limit"]):
            print(f"{row['name']} left out: it may take {row['limit']} s; FILTER={row['name']}")
            continue
        begun += 1
        try:
            entry = measured(options, row, end)
        except Failed as error:
            failed += 1
            print(f"FAILED {row['name']}: {error}", file=sys.stderr)
            continue
        memory.write_results(path, merged(headline.read_long(path), entry))
        print(entry["name"], ", ".join(f"{key} {value:.6g}" for key, value in entry.items()
                                       if isinstance(value, (int, float))), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
