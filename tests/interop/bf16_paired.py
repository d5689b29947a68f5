"""Training in bf16: qlab against PEFT under autocast, paired over seeds.

    python tests/interop/bf16_paired.py [--qlab build/qlab] [--device cuda] [--seeds 5] [--steps 200]

SmolLM2-135M-Instruct in NF4 with double quantization. Per seed both start from the same adapter and
see the same sequences in the same order, with the same AdamW and schedule; qlab trains the seeds as
one gang, PEFT (bf16 base of the dequantized weights, fp32 adapters, torch.autocast) one after the
other. Compares the mean training loss of the last quarter of the steps, and the eval loss: mean
relative difference and its 95 % t-interval over the seeds. Exits 1 when the mean difference of the
training loss is 0.2 % or more, or when its interval does not contain zero (which chance alone makes
happen one time in twenty). Needs numpy, torch, transformers, peft, tokenizers; no network.
"""

import argparse
import copy
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import peft
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests/golden"), str(ROOT / "tools")]
import extract_python_functions  # noqa: E402
import make_smollm2_golden as golden  # noqa: E402
import qlab_reference as reference  # noqa: E402

LIMIT = 0.002
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
R, ALPHA, LR, WEIGHT_DECAY, EVAL_EXAMPLES = 16, 32, 5e-4, 0.01, 64
SWEEP = """\
name: bf16-paired
base:
  model: {{path: {model}}}
  quant: {{type: nf4, block_size: 64, double_quant: true, compute_dtype: bf16}}
  lora: {{r: {r}, alpha: {alpha}, dropout: 0, targets: all-linear}}
  data: {{eval: {folder}/eval.jsonl, shuffle: false}}
  train: {{steps: {steps}, batch_size: {batch}, save_every: 0}}
  optim: {{lr: {lr}, weight_decay: {decay}, schedule: cosine, warmup_steps: {warmup}}}
  parallel: {{trials_per_gpu: {seeds}}}
paired:
"""
PAIR = "  - {{data.train: {folder}/train-{seed}.jsonl, train.init_seed: {seed}}}\n"


def tokenized(path, length):
    """Functions of the standard library, in the order of their hash, cut at `length` tokens."""
    metadata, _ = reference.read_gguf(path)
    tokenizer = golden.build_tokenizer(metadata)
    examples = []
    for _, example in sorted(extract_python_functions.examples(), key=lambda item: item[0]):
        prompt = tokenizer.encode(example["prompt"]).ids
        ids = (prompt + tokenizer.encode(example["completion"]).ids + [golden.EOS])[:length]
        if len(ids) - len(prompt) >= 16:
            examples.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt):]})
    return examples


def draw(examples, seed, count):
    """`count` examples: permutations by the seed, one after another."""
    random, chosen = np.random.default_rng(seed), []
    while len(chosen) < count:
        chosen += [examples[i] for i in random.permutation(len(examples))]
    return chosen[:count]


def run_qlab(options, train, held_out, folder):
    write = lambda name, rows: (folder / name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    write("eval.jsonl", held_out)
    text = SWEEP.format(model=options.model, r=R, alpha=ALPHA, folder=folder, steps=options.steps,
                        batch=options.batch, lr=LR, decay=WEIGHT_DECAY, warmup=warmup(options),
                        seeds=options.seeds)
    for seed, rows in train.items():
        write(f"train-{seed}.jsonl", rows)
        text += PAIR.format(folder=folder, seed=seed)
    (folder / "sweep.yaml").write_text(text)
    command = [options.qlab, "sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out"),
               "--device", options.device]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    runs = {}
    for trial in (folder / "out/trials").iterdir():
        seed = int(re.search(r"init_seed: (\d+)", (trial / "config.yaml").read_text())[1])
        records = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        evals = [r["eval_loss"] for r in records if "eval_loss" in r]
        runs[seed] = {"loss": [r["loss"] for r in records if "loss" in r], "eval_0": evals[0],
                      "eval": evals[-1]}
    return runs


def warmup(options):
    return max(1, options.steps // 20)


def to_batches(rows, size, device):
    """Padded on the right; under a causal mask no trained token sees the padding."""
    batches = []
    for first in range(0, len(rows), size):
        part = rows[first:first + size]
        width = max(len(row["input_ids"]) for row in part)
        pad = lambda key, fill: torch.tensor(
            [row[key] + [fill] * (width - len(row[key])) for row in part])
        ids, labels = pad("input_ids", 0), pad("labels", -100)[:, 1:].flatten()
        batches.append((ids.to(device), labels.to(device), int((labels != -100).sum())))
    return batches


def loss_sum(model, ids, labels, device):
    with torch.autocast(device, torch.bfloat16):
        logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels,
                                             ignore_index=-100, reduction="sum")


def evaluate(model, batches, device):
    with torch.no_grad():
        total = sum(loss_sum(model, ids, labels, device).double() for ids, labels, _ in batches)
    return float(total) / sum(count for _, _, count in batches)


def run_peft(options, base, rows, held_out, seed):
    device = options.device.split(":")[0]
    model = reference.add_lora(base, R, ALPHA, reference.LINEARS, seed).to(options.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in parameters)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup(options),
                                                             options.steps)
    eval_batches = to_batches(held_out, options.batch, options.device)
    result = {"eval_0": evaluate(model, eval_batches, device)}
    losses = []
    for ids, labels, count in to_batches(rows, options.batch, options.device):
        loss = loss_sum(model, ids, labels, device) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    result["loss"] = torch.stack(losses).tolist()
    result["eval"] = evaluate(model, eval_batches, device)
    return result


def interval(values):
    """Mean and half width of its 95 % t-interval."""
    if len(values) < 2:
        return values[0], math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), T_95[len(values) - 1] * spread


def compare(options, ours, theirs):
    last = max(1, options.steps // 4)
    tail = lambda run: statistics.mean(run["loss"][-last:])
    measures = {"train": tail, "eval": lambda run: run["eval"], "eval_0": lambda run: run["eval_0"]}
    result = {"last_steps": last}
    for name, measure in measures.items():
        pairs = [(measure(ours[s]), measure(theirs[s])) for s in sorted(ours)]
        print(f"\n{name + ' loss':<12} {'qlab':>10} {'PEFT':>10} {'difference':>11}")
        differences = [(a - b) / b for a, b in pairs]
        for seed, (a, b), d in zip(sorted(ours), pairs, differences):
            print(f"  seed {seed:<5} {a:>10.5f} {b:>10.5f} {100 * d:>10.4f}%")
        mean, half = interval(differences)
        print(f"  mean difference {100 * mean:.4f} %, 95 % interval {100 * (mean - half):.4f} to "
              f"{100 * (mean + half):.4f} %")
        result[name] = {"qlab": [a for a, _ in pairs], "peft": [b for _, b in pairs],
                        "mean_relative_difference": mean, "interval": [mean - half, mean + half]}
    train = result["train"]
    result["passed"] = abs(train["mean_relative_difference"]) < LIMIT and (
        train["interval"][0] <= 0 <= train["interval"][1])
    return result


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-instruct-q4_1.gguf"))
    parser.add_argument("--device", default="cuda")
    for name, default in (("seeds", 5), ("steps", 200), ("batch", 8), ("length", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", default=str(ROOT / "bench/results/bf16_paired.json"))
    return parser.parse_args()


def main():
    options = parse_options()
    examples = tokenized(options.model, options.length)
    held_out, pool = examples[:EVAL_EXAMPLES], examples[EVAL_EXAMPLES:]
    train = {seed: draw(pool, seed, options.steps * options.batch)
             for seed in range(1, options.seeds + 1)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ours = run_qlab(options, train, held_out, pathlib.Path(folder))
    print(f"qlab: {options.seeds} runs in {time.perf_counter() - start:.1f} s", flush=True)
    base = reference.build_llama(options.model, dtype=torch.bfloat16)
    theirs = {}
    for seed, rows in train.items():
        start = time.perf_counter()
        theirs[seed] = run_peft(options, copy.deepcopy(base), rows, held_out, seed)
        print(f"PEFT: seed {seed} in {time.perf_counter() - start:.1f} s", flush=True)
    result = compare(options, ours, theirs)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    version = subprocess.run([options.qlab, "--version"], capture_output=True, text=True)
    result |= {"device": name, "qlab": version.stdout.strip(), "torch": torch.__version__,
               "transformers": transformers.__version__, "peft": peft.__version__,
               "seeds": sorted(train), "steps": options.steps, "batch": options.batch,
               "length": options.length, "pool": len(pool),
               "losses": {"qlab": [ours[s]["loss"] for s in sorted(ours)],
                          "peft": [theirs[s]["loss"] for s in sorted(theirs)]}}
    pathlib.Path(options.output).write_text(json.dumps(result) + "\n")
    print(f"\n{'passed' if result['passed'] else 'FAILED'}; {options.output}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
