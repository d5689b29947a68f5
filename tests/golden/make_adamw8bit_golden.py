"""Writes adamw8bit.safetensors: ten steps of bitsandbytes' 8-bit AdamW on the CPU.

    TORCH_COMPILE_DISABLE=1 python tests/golden/make_adamw8bit_golden.py

Needs bitsandbytes (0.50.2 was used), torch, triton, safetensors. The steps are those of its backend in
plain PyTorch, which looks for the nearest entry of the maps as the GPU does. (The optimizer of its CPU
backend codes by a table of 65,536 entries, too coarse for second moments far below their block's
largest.) It decays weights before the update and does not correct signs.

One parameter of 4,133 elements, so that the last block has 37; gradients and initial values are
fractions that tests/adamw8bit_test.cpp forms again. Kept are the maps, and parameter, codes and absmax
after the ninth and the tenth step.
"""

import pathlib

import bitsandbytes as bnb
import numpy as np
import safetensors.torch
import torch
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch
from bitsandbytes.functional import create_dynamic_map

N, STEPS = 4133, 10
BLOCKS = (N + 255) // 256
HERE = pathlib.Path(__file__).resolve().parent


def gradient(step):
    i = np.arange(N, dtype=np.int64)
    g = ((i * 7919 + step * 104729) % 2003 - 1001) / 1001.0 * 2.0 ** -(i % 11)
    g[(i >= 768) & (i < 1024)] = 0  # a block without any
    return torch.from_numpy(g.astype(np.float32))


def main():
    start = ((np.arange(N, dtype=np.int64) * 31 + 7) % 997 - 498) / 498.0
    p = torch.from_numpy(start.astype(np.float32))
    m, v = torch.zeros(N, dtype=torch.uint8), torch.zeros(N, dtype=torch.uint8)
    m_absmax, v_absmax = torch.zeros(BLOCKS), torch.zeros(BLOCKS)
    signed, unsigned = create_dynamic_map(True), create_dynamic_map(False)
    kept = {"signed": signed, "unsigned": unsigned}
    for step in range(1, STEPS + 1):
        optimizer_update_8bit_blockwise_pytorch(
            p, gradient(step), m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-3, signed, unsigned,
            m_absmax, v_absmax, 0.1, 1.0, False, optimizer_name="adam")
        if step >= STEPS - 1:
            for name, value in (("p", p), ("m", m), ("v", v), ("m_absmax", m_absmax),
                                ("v_absmax", v_absmax)):
                kept[f"{step}.{name}"] = value.clone()
    safetensors.torch.save_file(kept, HERE / "adamw8bit.safetensors",
                                {"bitsandbytes": bnb.__version__, "torch": torch.__version__})


main()
