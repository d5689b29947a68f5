"""LoRA training steps of SmolLM2-135M's shapes by PyTorch and PEFT, fp32 on the CPU, timed.

    python bench/peers/cpu_peft.py [--threads 2] [--steps 4] [--batch 4] [--length 256]

One measurement as JSON. With --serve it reads "BATCH LENGTH STEPS" lines and answers each with a
line of JSON, so that bench/cpu_step.py can alternate with another program without starting anew.
A step is forward, backward, clipping and AdamW; r = 16 on every linear module, dropout 0, no
padding, every token trained. The first step of each measurement is not counted.
"""

import argparse
import json
import sys
import time

import peft
import torch
import transformers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build():
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0,
                                                       target_modules=TARGETS))
    return model.train()


class Trainer:
    def __init__(self):
        torch.manual_seed(0)
        self.model = build()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, weight_decay=0.0)

    def step(self, ids):
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def measure(self, batch, length, steps):
        seconds = []
        for i in range(steps + 1):
            ids = torch.randint(49152, (batch, length))
            start = time.perf_counter()
            self.step(ids)
            if i > 0:
                seconds.append(time.perf_counter() - start)
        return seconds


def environment():
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__, "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "blas": [line for line in lines if ("Math" in line or "MKL" in line or "BLAS" in line)
                     and not line.startswith("Build settings")],
            "blas_info": next((part.strip() for line in lines for part in line.split(",")
                               if "BLAS_INFO" in part), ""),
            "capability": torch.backends.cpu.get_cpu_capability()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("threads", 2), ("steps", 4), ("batch", 4), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trainer = Trainer()
    if not options.serve:
        seconds = trainer.measure(options.batch, options.length, options.steps)
        print(json.dumps({"seconds": seconds, **environment()}))
        return
    print(json.dumps(environment()), flush=True)
    for line in sys.stdin:
        print(json.dumps(trainer.measure(*map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
