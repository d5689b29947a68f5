"""Our side of the step benchmark: `qlab train` on the rows of bench/step_rows.json.

    python bench/steps.py [--qlab build/qlab] [--rows REGEX] [--steps N] [--check few|all|none]
                          [--output FILE]

Every token is trained, as by the peers. A step's time is status.json's step_seconds_median, which
leaves out the first steps, where it is there; otherwise the median time between the lines of
metrics.jsonl, one of which is written after every step. The first steps are not counted. The peak
is status.json's peak_bytes: the highest total of the allocator, through which all memory comes.

A row may name implementations that run with --replicas, on as many GPUs; where these are not there
the whole row is left out. Their adapter must be the file of those on one GPU.

A row of few tokens is then trained once more without CUDA graphs: the adapters of both runs must be
the same files. With --check all every row is, over 20 steps. A row whose adapters differ has no
figures, and the program ends with 1.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import measure
from peers import support

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNCOUNTED = 4  # steps: launches are prepared and clocks rise
CHECKED = 20  # steps, after which adapters are compared


def configuration(row, extra, steps):
    """The row as a config file, or as a sweep of as many seeds as the gang has trials; `extra` may
    set any key. (JSON is YAML.)"""
    keys = {"model.path": "synthetic:" + row["model"], "quant.type": "nf4",
            "quant.block_size": 64, "quant.double_quant": True, "lora.r": row["r"],
            "lora.alpha": 2 * row["r"], "lora.dropout": row["dropout"],
            "lora.targets": row["targets"], "data.train": "synthetic",
            "data.seq_len": row["length"], "train.steps": steps,
            "train.batch_size": row["batch"], "train.save_every": 0, "optim.lr": 2e-4}
    if "accum" in row:
        keys["train.grad_accum"] = row["accum"]
    blocks = measure.nested(keys | extra)
    if "gang" not in row:
        return blocks
    blocks["parallel"] = {"trials_per_gpu": row["gang"]}
    return {"name": row["name"], "base": blocks, "seeds": list(range(row["gang"])),
            "parameters": {"lora.r": {"values": [row["r"]]}}}


def lines_as_they_come(process, folder):
    """When each line of metrics.jsonl was first seen."""
    metrics, seen, arrivals = None, 0, []
    while True:
        ended = process.poll() is not None
        metrics = metrics or next(folder.glob("out/trials/*/metrics.jsonl"), None)
        count = metrics.read_bytes().count(b"\n") if metrics else 0
        arrivals += [time.perf_counter()] * (count - seen)
        seen = max(seen, count)
        if ended:
            return arrivals
        time.sleep(0.0005)


def gpu_count():
    """That a program sees here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def too_few_gpus(row, device):
    """Why the row cannot be measured here, or ""."""
    wanted = max(row.get("replicas", {}).values(), default=1)
    here = gpu_count() if wanted > 1 and device != "cpu" else wanted
    return f"needs {wanted} GPUs, and {here} is here" if here < wanted else ""


def run(qlab, row, extra, steps, device, limit, replicas=1):
    """One training; its times and peak, or the error that ended it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = folder / "step.yaml"
        config.write_text(json.dumps(configuration(row, extra, steps)))
        log = open(folder / "log.txt", "w+")
        begin = time.perf_counter()
        command = "sweep" if "gang" in row else "train"
        several = ["--replicas", str(replicas)] if replicas > 1 else []
        process = subprocess.Popen(["timeout", str(limit), qlab, command, str(config), "--device",
                                    device, "--out", str(folder / "out"), *several],
                                   stdout=log, stderr=log)
        arrivals = lines_as_they_come(process, folder)
        trials = [json.loads(p.read_text()) for p in folder.glob("out/trials/*/status.json")]
        status = next((t for t in trials if t.get("status") != "finished"),
                      trials[0] if trials else {})
        if process.returncode != 0 or status.get("status") != "finished":
            log.seek(0)
            text = log.read().strip().splitlines()[-4:]
            return {"error": status.get("error") or " | ".join(text) or
                    f"exit status {process.returncode}"}
        return times_of(row, status, arrivals) | {"start_seconds": arrivals[0] - begin,
                                                  "adapter_sha256": adapters(folder),
                                                  "config": configuration(row, extra, steps)}


def adapters(folder):
    """The SHA-256 of each trial's adapter, in the order of their directories."""
    found = sorted(folder.glob("out/trials/*/adapter/adapter_model.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in found]


def checked(result, train):
    """The result with `graphs_off_equal`; `train` runs the same row without graphs."""
    if "error" in result:
        return result
    plain = train()
    if "error" in plain:
        return {"error": "without graphs: " + plain["error"]}
    if not result["adapter_sha256"] or result["adapter_sha256"] != plain["adapter_sha256"]:
        return {"error": "its adapter is not that of the run without graphs",
                "adapter_sha256": result["adapter_sha256"], "graphs_off_equal": False}
    return result | {"graphs_off_equal": True}


def as_on_one_gpu(result, row, before):
    """The result of an implementation with replicas, held against the row's first on one GPU, which
    is among `before`."""
    one = next((r for r in before if r["name"].rsplit("/", 1)[0] == row["name"] and
                r["name"].rsplit("/", 1)[1] not in row["replicas"] and "error" not in r), None)
    if "error" in result or one is None:
        return result
    if not result["adapter_sha256"] or result["adapter_sha256"] != one["adapter_sha256"]:
        return {"error": f"its adapter is not that of {one['name']}",
                "adapter_sha256": result["adapter_sha256"]}
    return result


def times_of(row, status, arrivals):
    tokens = row.get("gang", 1) * row.get("accum", 1) * row["batch"] * row["length"]
    result = {"peak_bytes": status["peak_bytes"], "device": status.get("device")}
    differences = [b - a for a, b in zip(arrivals, arrivals[1:])][UNCOUNTED:]
    apart = bool(differences) and statistics.median(differences) > 0  # not seen several at once
    if status.get("step_seconds_median"):
        result |= {"step_seconds": status["step_seconds_median"], "timed_by": "status.json"}
    elif apart:
        result |= {"step_seconds": support.spread(differences)[0], "timed_by": "metrics.jsonl"}
    else:
        return {"error": f"{len(arrivals)} steps are too few: {UNCOUNTED} are not counted"}
    if apart:
        result |= {"noise_percent": support.spread(differences)[1],
                   "seconds": [round(d, 5) for d in differences]}
    if "mfu" in status:
        result["mfu"] = status["mfu"]
    return result | {"tokens_per_s": tokens / result["step_seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--rows", default="", type=measure.regular_expression,
                        help="only rows whose name this expression finds")
    parser.add_argument("--steps", type=int,
                        help="20, but 12 where a row of many tokens is not checked")
    parser.add_argument("--check", choices=["few", "all", "none"], default="few",
                        help="which rows are trained without graphs as well")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=120, help="seconds for one training")
    parser.add_argument("--output")
    options = parser.parse_args()
    rows, failed = [], 0
    for row in measure.found_rows(measure.ROWS_OF_STEPS, options.rows):
        if why := too_few_gpus(row, options.device):
            print(f"{row['name']} left out: {why}", flush=True)
            continue
        for ours, extra in row["ours"].items():
            if support.time_is_up():
                print(f"{row['name']}/{ours} left out: QLAB_BENCH_SECONDS have passed")
                continue
            few = "gang" not in row and row["batch"] * row["length"] <= 4096
            check = options.check == "all" or (options.check == "few" and few)
            steps = options.steps or (CHECKED if few or check else 12)

            replicas = row.get("replicas", {}).get(ours, 1)

            def train(keys):
                return run(options.qlab, row, keys, steps, options.device, options.limit, replicas)

            result = train(extra)
            if check:
                result = checked(result, lambda: train(extra | {"train.graphs": False}))
            if replicas > 1:
                result = as_on_one_gpu(result, row, rows)
            rows.append({"name": f"{row['name']}/{ours}", **result})
            failed += "error" in result
            print(rows[-1]["name"], result.get("error") or
                  f"{result['tokens_per_s']:.1f} tokens/s, {1e3 * result['step_seconds']:.2f} ms "
                  f"a step, peak {1e-9 * result['peak_bytes']:.3f} GB"
                  + (", adapter as without graphs" if "graphs_off_equal" in result else ""),
                  flush=True)
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps({"rows": rows}) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
