"""Writes smollm2.json: logits of SmolLM2-135M-Instruct by Transformers, and 20 training steps by
PEFT with PyTorch's AdamW, all in float32 on the CPU. The same steps in float64 give each step a
second gradient norm, and three more runs in float32, whose weights are disturbed by its rounding, how
far float32 may be off there.

    python tests/golden/make_smollm2_golden.py [MODEL.gguf]

Needs numpy, torch, transformers, peft, tokenizers; the file records their versions.
"""

import json
import pathlib
import platform
import sys

import numpy as np
import peft
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tools"))
import extract_python_functions  # noqa: E402
import qlab_reference as reference  # noqa: E402

MODEL = HERE.parent.parent / "models/smollm2-135m-instruct-q4_1.gguf"
STEPS, GRAD_ACCUM, BATCH, WARMUP = 20, 2, 2, 3
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CONFIGS = {"attention": {"r": 8, "alpha": 16, "targets": ATTENTION, "seed": 11},
           "all-linear": {"r": 4, "alpha": 8, "targets": reference.LINEARS, "seed": 12}}
CODE = '''def bisect_right(a, x, lo=0, hi=None):
    if hi is None:
        hi = len(a)
    while lo < hi:
        mid = (lo + hi) // 2
        if x < a[mid]:
            hi = mid
        else:
            lo = mid + 1
    return lo
'''
PROSE = ("The lighthouse keeper wrote down the weather every evening: wind from the west, rain at "
         "four o'clock, a ship with two masts. Nobody had ever asked him to, and nobody read it.")
EOS = 2
TOP, OTHERS = 16, [(769 * i + 13) % 49152 for i in range(64)]


def build_tokenizer(metadata):
    """The byte-level BPE that the GGUF file describes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    return tokenizer


def make_sequences(tokenizer, count):
    """32 to 64 tokens each; the completion and, where it is whole, the EOS after it are trained."""
    sequences = []
    for _, example in sorted(extract_python_functions.examples(), key=lambda item: item[0]):
        begin = tokenizer.encode(example["prompt"]).ids
        ids = begin + tokenizer.encode(example["completion"]).ids + [EOS]
        ids = ids[:40 + 3 * (len(sequences) % 9)]
        if len(ids) < 32 or len(ids) - len(begin) < 8:
            continue
        sequences.append({"input_ids": ids, "labels": [-100] * len(begin) + ids[len(begin):]})
        if len(sequences) == count:
            return sequences
    raise SystemExit(f"only {len(sequences)} sequences found, {count} needed")


def floats(values):
    return [float(f"{v:.9g}") for v in values]


def logit_records(model, ids, positions):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    records = []
    for position in positions:
        row = logits[position]
        top = torch.topk(row, TOP)
        records.append({"position": position, "top_ids": top.indices.tolist(),
                        "top": floats(top.values.tolist()),
                        "others": floats(row[OTHERS].tolist()),
                        "logsumexp": float(torch.logsumexp(row.double(), 0)),
                        "rms": float(row.double().square().mean().sqrt())})
    return records


def loss_sum(model, batch):
    """Sum of the trained tokens' losses of sequences padded on the right."""
    width = max(len(s["input_ids"]) for s in batch)
    pad = lambda key, fill: torch.tensor(
        [s[key] + [fill] * (width - len(s[key])) for s in batch])
    mask = torch.tensor([[1] * len(s["input_ids"]) + [0] * (width - len(s["input_ids"]))
                         for s in batch])
    logits = model(input_ids=pad("input_ids", 0), attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                             pad("labels", -100)[:, 1:].flatten(),
                                             ignore_index=-100, reduction="sum")


def trained(batch):
    return sum(label != -100 for s in batch for label in s["labels"][1:])


def train(model, sequences):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    window = BATCH * GRAD_ACCUM
    steps = []
    for step in range(STEPS):
        batch = sequences[step * window:(step + 1) * window]
        total = 0.0
        for m in range(0, window, BATCH):
            loss = loss_sum(model, batch[m:m + BATCH]) / trained(batch)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        steps.append({"loss": total, "grad_norm": norm.item(), "lr": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        print(f"  step {step + 1}: {steps[-1]}")
    return steps


def eval_loss(model, sequence):
    with torch.no_grad():
        return loss_sum(model, [sequence]).item() / trained([sequence])


def adapter_values(model):
    """The first four values of A and of B, which are rows of A and columns' heads of B."""
    values = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".default.weight", "")
        if "lora_" in name and name.split(".")[2] in ("0", "15", "29"):
            values[name] = floats(parameter.detach().flatten()[:4].tolist())
    return values


def build_trial(path, c, double=False):
    model = reference.add_lora(reference.build_llama(path), c["r"], c["alpha"], c["targets"],
                               c["seed"])
    return reference.in_double(model) if double else model


def add_double_norms(path, run, sequences):
    """The gradient norms of the same steps in float64."""
    for step, double in zip(run["steps"], train(build_trial(path, run, True), sequences)):
        step["grad_norm_fp64"] = double["grad_norm"]


def add_rounding(path, run, sequences):
    """Of each step, the largest relative distance from float64 of four float32 runs' gradient norms:
    this one's, and those of three whose weights are each multiplied by 1 + 2^-23 z, z normal."""
    disturbed = []
    for seed in (1, 2, 3):
        model, generator = build_trial(path, run), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2**-23 * torch.randn(p.shape, generator=generator))
        disturbed.append(train(model, sequences))
    for i, step in enumerate(run["steps"]):
        exact = step["grad_norm_fp64"]
        norms = [step["grad_norm"]] + [other[i]["grad_norm"] for other in disturbed]
        step["grad_norm_rounding"] = float(f"{max(abs(n / exact - 1) for n in norms):.3g}")


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else str(MODEL)
    torch.manual_seed(0)
    metadata, _ = reference.read_gguf(path)
    tokenizer = build_tokenizer(metadata)
    inputs = {"code": tokenizer.encode(CODE).ids[:64], "prose": tokenizer.encode(PROSE).ids}
    golden = {
        "model_sha256": reference.sha256(path),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "peft": peft.__version__,
                     "tokenizers": tokenizers.__version__, "numpy": np.__version__},
        "other_ids": OTHERS, "inputs": inputs, "logits": {}}
    for quant in ("none", "nf4"):
        model = reference.build_llama(path, quant)
        golden["logits"][quant] = {
            name: logit_records(model, ids, [0, 5, len(ids) // 2, len(ids) - 1])
            for name, ids in inputs.items()}
    *sequences, held_out = make_sequences(tokenizer, STEPS * BATCH * GRAD_ACCUM + 1)
    golden["sequences"], golden["held_out"] = sequences, held_out
    golden["training"] = {"steps": STEPS, "batch_size": BATCH, "grad_accum": GRAD_ACCUM,
                          "warmup_steps": WARMUP, "max_grad_norm": MAX_GRAD_NORM, **ADAMW}
    golden["runs"] = {}
    for name, c in CONFIGS.items():
        print(name)
        model = build_trial(path, c)
        before = eval_loss(model, held_out)
        steps = train(model, sequences)
        golden["runs"][name] = {**c, "eval_loss_0": before, "steps": steps,
                                "eval_loss": eval_loss(model, held_out),
                                "adapter": adapter_values(model)}
        add_double_norms(path, golden["runs"][name], sequences)
        add_rounding(path, golden["runs"][name], sequences)
    # One line per record: readable differences when the file is made again.
    text = json.dumps(golden, indent=1)
    output = HERE / "smollm2.json"
    output.write_text(compact(text) + "\n")
    print(f"{output}: {output.stat().st_size} bytes")


def compact(text):
    """Joins the lines of lists of numbers."""
    out = []
    for line in text.splitlines():
        if out and out[-1].endswith(("[", ",")) and line.strip(" ,-")[:1].isdigit():
            out[-1] += ("" if out[-1].endswith("[") else " ") + line.strip()
        elif out and line.strip(" ,") == "]" and out[-1][-1:].isdigit():
            out[-1] += line.strip()
        else:
            out.append(line)
    return "\n".join(out)


if __name__ == "__main__":
    main()
