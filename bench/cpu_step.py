"""A LoRA training step of SmolLM2-135M on the CPU: qlab against PyTorch with PEFT, in alternation.

    python bench/cpu_step.py [--qlab build/qlab] [--threads 2] [--repeats 3] [--steps 3]

Both train r = 16 on every linear module of the same shapes in fp32, dropout 0, every token trained,
on 4 x 256 and on 1 x 256 tokens; PyTorch uses the BLAS it was built with. Each repeat runs qlab,
then PEFT, `steps` timed steps each after one that does not count. Needs a quiet machine, torch,
transformers and peft. Writes bench/results/cpu_step.json and prints a table; about 3 minutes.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import measure

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = [(4, 256), (1, 256)]
HIDDEN, KV, INTERMEDIATE, LAYERS, VOCABULARY = 576, 192, 1536, 30, 49152
CONFIG = """\
model: {{path: "synthetic:smollm2-135m"}}
quant: {{type: fp32, compute_dtype: fp32}}
lora: {{r: 16, alpha: 32, dropout: 0, targets: all-linear}}
data: {{train: synthetic, seq_len: {length}}}
train: {{steps: {steps}, batch_size: {batch}, save_every: 0}}
optim: {{lr: 0.0002, weight_decay: 0}}
"""
FORMULA = ("4 FLOP per weight of the frozen linears and of lm_head and token (forward and input "
           "gradient), and 6 T^2 576 per layer and sequence of T tokens for causal attention "
           "(2 products forward, 4 backward, half of each T x T); the products of LoRA itself, "
           "norms, softmax and the optimizer are not counted")


def flops(batch, length):
    linears = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * INTERMEDIATE)
    attention = LAYERS * 6 * length * length * HIDDEN
    return batch * (length * 4 * (linears + VOCABULARY * HIDDEN) + attention)


def qlab_seconds(options, batch, length):
    """The times between the lines of metrics.jsonl, one of which is written after every step."""
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "step.yaml"
        config.write_text(CONFIG.format(batch=batch, length=length, steps=options.steps + 1))
        log = open(pathlib.Path(folder) / "log.txt", "w+")
        process = subprocess.Popen(
            [options.qlab, "train", str(config), "--out", f"{folder}/out", "--device", "cpu"],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
        metrics, seen, arrivals = None, 0, []
        while True:
            ended = process.poll() is not None
            metrics = metrics or next(pathlib.Path(folder).glob("out/trials/*/metrics.jsonl"), None)
            size = metrics.stat().st_size if metrics else 0
            if size != seen:
                seen = size
                arrivals.append(time.perf_counter())
            if ended:
                break
            time.sleep(0.002)
        if process.returncode != 0 or len(arrivals) != options.steps + 1:
            log.seek(0)
            sys.exit(f"qlab gave {len(arrivals)} of {options.steps + 1} steps:\n{log.read()}")
    return [b - a for a, b in zip(arrivals, arrivals[1:])]


class Peft:
    def __init__(self, options):
        script = ROOT / "bench/peers/cpu_peft.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--serve", "--threads", str(options.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)})
        self.environment = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("cpu_peft.py ended early")
        return json.loads(line)

    def seconds(self, options, batch, length):
        self.process.stdin.write(f"{batch} {length} {options.steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def summary(seconds, batch, length):
    median = statistics.median(seconds)
    deviation = statistics.median(abs(s - median) for s in seconds)
    return {"median_s": round(median, 4), "tokens_per_s": round(batch * length / median, 1),
            "gflop_per_s": round(flops(batch, length) / median / 1e9, 1),
            "deviation_percent": round(100 * deviation / median, 2),
            "min_s": round(min(seconds), 4), "max_s": round(max(seconds), 4),
            "seconds": [round(s, 4) for s in seconds]}


def cpu_model():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "bench/results/cpu_step.json"))
    options = parser.parse_args()
    load = os.getloadavg()
    if load[0] > 0.5:
        print(f"load average {load[0]:.1f}: this machine is not quiet", file=sys.stderr)
    peer = Peft(options)
    times = {shape: {"qlab": [], "peft": []} for shape in SHAPES}
    for repeat in range(options.repeats):
        for shape in SHAPES:
            times[shape]["qlab"] += qlab_seconds(options, *shape)
            times[shape]["peft"] += peer.seconds(options, *shape)
    peer.close()
    version = subprocess.run([options.qlab, "--version"], capture_output=True, text=True)
    result = {"what": "LoRA training step of SmolLM2-135M's shapes, fp32, r 16, all-linear, CPU",
              "qlab": version.stdout.strip(), "commit": measure.qlab_commit(options.qlab),
              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
              "cpu": cpu_model(), "threads": options.threads, "cores": os.cpu_count(),
              "load_before": [round(x, 2) for x in load], "repeats": options.repeats,
              "steps_per_repeat": options.steps, "peer": peer.environment,
              "gflop_formula": FORMULA, "shapes": []}
    print(f"{'batch':<9} {'':<6} {'s/step':>8} {'noise':>7} {'tokens/s':>9} {'GFLOP/s':>8}")
    for (batch, length), seconds in times.items():
        rows = {name: summary(s, batch, length) for name, s in seconds.items()}
        ratio = rows["peft"]["median_s"] / rows["qlab"]["median_s"]
        result["shapes"].append({"batch": batch, "length": length,
                                 "speed_of_qlab_over_peft": round(ratio, 3), **rows})
        for name, row in rows.items():
            print(f"{f'{batch} x {length}':<9} {name:<6} {row['median_s']:>8.3f} "
                  f"{row['deviation_percent']:>6.1f}% {row['tokens_per_s']:>9.1f} "
                  f"{row['gflop_per_s']:>8.1f}")
        print(f"{'':<9} qlab is {ratio:.2f} times as fast as PEFT")
    output = pathlib.Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
