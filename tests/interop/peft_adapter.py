"""Adapters between qlab and PEFT, both ways, on SmolLM2-135M-Instruct in NF4 with fp32 arithmetic.

    python tests/interop/peft_adapter.py [--qlab build/qlab] [--model FILE.gguf] [--device cpu]

Trains an adapter with qlab, opens it with PeftModel.from_pretrained and compares losses; then
writes adapters with PEFT and lets `qlab eval --adapter` read them. PEFT must find every key and no
other, and losses must agree within 1e-5. Needs numpy, torch, transformers, peft; no network.
Exits 1 when something disagrees.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import warnings

import peft
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/golden"))
import qlab_reference as reference  # noqa: E402

BOUND = 1e-5
TRAIN = """\
model: {{path: {model}}}
quant: {{compute_dtype: fp32}}
lora: {{r: 6, alpha: 9, targets: {targets}, scaling: {scaling}}}
data: {{train: {data}, eval: {data}}}
train: {{steps: 6, batch_size: 4, init_seed: 3}}
optim: {{lr: 0.005, schedule: constant, warmup_steps: 0}}
"""
FROM_QLAB = {"list": ("[q_proj, v_proj, down_proj]", "alpha/r"),
             "keyword": ("all-linear", "alpha/sqrt(r)"),
             "regex": (r"'model\.layers\.[0-9]\.self_attn\.(k|o)_proj'", "alpha/r")}
FROM_PEFT = {"list": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
             "keyword": {"target_modules": "all-linear"},
             "regex": {"target_modules": r".*\.1\d\.mlp\.(gate|down)_proj"}}


def run_qlab(arguments, device):
    command = [*arguments, "--device", device]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def qlab_loss(options, data, adapter=None):
    command = [options.qlab, "eval", options.model, "--data", data, "--json", "--set",
               "quant.compute_dtype=fp32"]
    if adapter:
        command += ["--adapter", str(adapter)]
    return json.loads(run_qlab(command, options.device).splitlines()[-1])["loss"]


@torch.no_grad()
def reference_loss(model, sequences):
    total = count = 0
    for s in sequences:
        logits = model(torch.tensor([s["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(s["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100,
                                                   reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


class Checks:
    def __init__(self):
        self.failed = 0

    def that(self, condition, text):
        self.failed += not condition
        print(f"{'ok  ' if condition else 'FAIL'} {text}")

    def equal_losses(self, ours, theirs, text):
        difference = abs(ours - theirs) / theirs
        self.that(difference <= BOUND,
                  f"{text}: qlab {ours:.7f}, PEFT {theirs:.7f}, relative difference "
                  f"{difference:.1e}")


def open_with_peft(base, directory, checks, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, directory)
        loaded = model.load_adapter(directory, "again")
    about_keys = [str(w.message) for w in caught if "key" in str(w.message).lower()]
    adapter_keys = [k for k in loaded.missing_keys if "lora_" in k]
    checks.that(not about_keys and not loaded.unexpected_keys and not adapter_keys,
                f"{name}: PEFT misses no key and finds none left over "
                f"{[*about_keys, *loaded.unexpected_keys, *adapter_keys][:3] or ''}")
    return model.eval()


def from_qlab(options, folder, data, sequences, base_loss, checks):
    for name, (targets, scaling) in FROM_QLAB.items():
        config = folder / f"{name}.yaml"
        config.write_text(TRAIN.format(model=options.model, data=data, targets=targets,
                                       scaling=scaling))
        out = folder / f"run-{name}"
        run_qlab([options.qlab, "train", str(config), "--out", str(out)], options.device)
        adapter, = out.glob("trials/*/adapter")
        model = open_with_peft(reference.build_llama(options.model), str(adapter), checks,
                               f"qlab's {name} adapter")
        ours, theirs = qlab_loss(options, data, adapter), reference_loss(model, sequences)
        checks.equal_losses(ours, theirs, f"qlab's {name} adapter")
        checks.that(abs(ours - base_loss) > 0.01 * base_loss,
                    f"qlab's {name} adapter changes the loss from {base_loss:.4f}")


def from_peft(options, folder, data, sequences, base_loss, checks):
    for name, settings in FROM_PEFT.items():
        torch.manual_seed(5)
        config = peft.LoraConfig(r=5, lora_alpha=7, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(reference.build_llama(options.model), config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.3)
        adapter = folder / f"peft-{name}"
        model.save_pretrained(adapter)
        ours, theirs = qlab_loss(options, data, adapter), reference_loss(model, sequences)
        checks.equal_losses(ours, theirs, f"PEFT's {name} adapter")
        checks.that(abs(theirs - base_loss) > 0.01 * base_loss,
                    f"PEFT's {name} adapter changes the loss from {base_loss:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--qlab", default=str(ROOT / "build/qlab"))
    parser.add_argument("--model", default=str(ROOT / "models/smollm2-135m-instruct-q4_1.gguf"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    golden = json.loads((ROOT / "tests/golden/smollm2.json").read_text())
    sequences = golden["sequences"][:8]
    checks = Checks()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        data = str(folder / "data.jsonl")
        pathlib.Path(data).write_text("".join(json.dumps(s) + "\n" for s in sequences))
        base_loss = reference_loss(reference.build_llama(options.model), sequences)
        checks.equal_losses(qlab_loss(options, data), base_loss, "no adapter")
        from_qlab(options, folder, data, sequences, base_loss, checks)
        from_peft(options, folder, data, sequences, base_loss, checks)
    print(f"torch {torch.__version__}, peft {peft.__version__}: {checks.failed} failures")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
