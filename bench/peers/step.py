"""Training steps of Transformers + PEFT + bitsandbytes, with and without Liger, timed.

    PYTHONPATH=... python bench/peers/step.py [--rows REGEX] [--output FILE]

Measures the rows of bench/step_rows.json from random weights: speed and memory do not depend on
them. The stacks:
  hf-documented    prepare_model_for_kbit_training (norms, embedding and lm_head in fp32)
  hf-tuned         the same without the upcast
  hf-tuned+liger   with Liger's RMSNorm, RoPE, SwiGLU and fused linear cross entropy as well
All in NF4 with double quantization, SDPA attention, fp32 adapters under bf16 autocast, gradients
clipped, bitsandbytes' 32-bit AdamW. A step's time is taken between two synchronizations; the first
two steps are not counted. The peak is torch's max_memory_allocated over the steps.
"""

import argparse
import gc
import json
import pathlib
import re
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import support

ROWS = pathlib.Path(__file__).resolve().parent.parent / "step_rows.json"
TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
           "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                          "down_proj"]}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
SHAPES = {
    "llama-3.1-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                         max_position_embeddings=131072, rope_parameters=LLAMA3_ROPE,
                         tie_word_embeddings=False),
    "smollm2-135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         max_position_embeddings=8192, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
}


def quantize_linears(model, bnb):
    """Replaces every linear layer but lm_head by bitsandbytes' 4-bit one, layer by layer."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
                continue
            quantized = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False,
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                device="meta")
            quantized.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4",
                compress_statistics=True)._quantize("cuda")
            quantized.weight.module = quantized
            setattr(parent, name, quantized)
    model.is_loaded_in_4bit = True


def base_model(shape, bnb, transformers):
    config = transformers.LlamaConfig(rms_norm_eps=1e-5, use_cache=False, **SHAPES[shape])
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    quantize_linears(model, bnb)
    gc.collect()
    torch.cuda.empty_cache()
    return model


class Stack:
    """One model at a time, built anew only when a row needs another one."""

    def __init__(self, report):
        self.bnb = report.find("bitsandbytes")
        self.transformers, self.peft = report.find("transformers"), report.find("peft")
        self.report, self.key, self.model = report, None, None

    def complete(self):
        return None not in (self.bnb, self.transformers, self.peft)

    def liger(self):
        """Patches Transformers for good: rows without Liger come first."""
        if self.report.find("liger_kernel") is None:
            return False
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
                                    fused_linear_cross_entropy=True)
        return True

    def build(self, peer, row):
        key = (peer, row["model"], row["r"], row["targets"], row["dropout"])
        if key != self.key:
            self.drop()
            model = base_model(row["model"], self.bnb, self.transformers)
            if peer == "hf-documented":
                model = self.peft.prepare_model_for_kbit_training(
                    model, use_gradient_checkpointing=True,
                    gradient_checkpointing_kwargs={"use_reentrant": False})
            for parameter in model.parameters():
                parameter.requires_grad = False
            model.enable_input_require_grads()
            lora = self.peft.LoraConfig(
                r=row["r"], lora_alpha=2 * row["r"], lora_dropout=row["dropout"], bias="none",
                target_modules=TARGETS[row["targets"]], task_type="CAUSAL_LM")
            self.key, self.model = key, self.peft.get_peft_model(model, lora).train()
        if row["checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        return self.model

    def drop(self):
        self.key = self.model = None
        gc.collect()
        torch.cuda.empty_cache()


def step_count(row):
    """More where the host sets the pace, and with it the noise. The first two are not counted."""
    return 22 if row["batch"] * row["length"] <= 4096 else 8


def step_times(model, bnb, row):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW32bit(parameters, lr=2e-4)
    ids = torch.randint(0, model.config.vocab_size, (row["batch"], row["length"]), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(step_count(row)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[2:], loss.item()


def measure(stack, peer, row):
    name = f"{row['name']}/{peer}"
    try:
        model = stack.build(peer, row)
        times, loss = step_times(model, stack.bnb, row)
    except torch.cuda.OutOfMemoryError as error:
        stack.report.add(name, error="out of memory: " + str(error).split(". ")[0])
        stack.drop()
        return
    median, noise = support.spread(times)
    stack.report.add(name, tokens_per_s=row["batch"] * row["length"] / median, step_seconds=median,
                     noise_percent=noise, peak_bytes=torch.cuda.max_memory_allocated(),
                     loss=loss, seconds=[round(t, 5) for t in times])
    gc.collect()
    torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose name this expression finds")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    report = support.Report()
    stack = Stack(report)
    rows = [row for row in json.loads(ROWS.read_text()) if re.search(options.rows, row["name"])]
    # Neighbours that differ in checkpointing alone share a model.
    rows.sort(key=lambda row: (row["model"], row["r"], row["dropout"]))
    if stack.complete():
        for peer in ("hf-documented", "hf-tuned", "hf-tuned+liger"):
            wanted = [row for row in rows if peer in row["peers"]]
            if not wanted or (peer.endswith("+liger") and not stack.liger()):
                continue
            for row in wanted:
                if not report.left_out(f"{row['name']}/{peer}"):
                    measure(stack, peer, row)
    report.write(options.output)


if __name__ == "__main__":
    main()
