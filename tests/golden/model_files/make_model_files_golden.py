#!/usr/bin/env python3
"""Writes the golden files of tests/data_safetensors_test.cpp and tests/data_gguf_test.cpp.

  reference.safetensors   by the reference writer: many dtypes, a scalar, an empty tensor
  blocks.gguf             one tensor of random blocks for each GGUF type
  blocks.safetensors      the same tensors, dequantized to fp32 by the gguf package
  llama/, llama.gguf      one small Llama, as Transformers names it and as GGUF stores it

usage: make_model_files_golden.py   with the packages gguf, safetensors, torch and numpy
"""
import importlib.metadata
import json
import pathlib

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = ("gguf", "safetensors", "torch", "numpy")


def reference_file():
    torch.manual_seed(1)
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2).to(torch.bfloat16),
        "h": torch.randn(7).to(torch.float16),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "ids": torch.arange(-3, 3),
        "small": torch.arange(5, dtype=torch.int32),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "odd/name \u00e9\"\\": torch.full((1,), float("nan")),
    }
    save_file(tensors, HERE / "reference.safetensors", metadata={"format": "pt"})


def random_blocks(rng, quantization, rows, cols):
    """Random bytes, in which the half-precision scales are ordinary numbers."""
    elems, size = gguf.GGML_QUANT_SIZES[quantization]
    data = rng.integers(0, 256, (rows * cols // elems, size), dtype=np.uint8)
    halves = {Type.Q6_K: [208], Type.Q4_0: [0], Type.Q5_0: [0], Type.Q8_0: [0]}
    for at in halves.get(quantization, [0, 2]):
        scale = rng.normal(0, 0.02, data.shape[0]).astype(np.float16)
        data[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def block_files():
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(HERE / "blocks.gguf", "llama")
    expected = {}
    for quantization in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K,
                         Type.Q6_K):
        data = random_blocks(rng, quantization, 3, 512)
        writer.add_tensor(quantization.name, data, raw_dtype=quantization)
        expected[quantization.name] = torch.from_numpy(dequantize(data, quantization))
    floats = rng.normal(0, 1, (3, 7)).astype(np.float32)
    bf16 = (floats.view(np.uint32) >> 16).astype(np.uint16)
    for kind, data in ((Type.F32, floats), (Type.F16, floats.astype(np.float16))):
        writer.add_tensor(kind.name, data)
        expected[kind.name] = torch.from_numpy(data.astype(np.float32))
    writer.add_tensor("BF16", bf16.view(np.uint8), raw_dtype=Type.BF16)
    expected["BF16"] = torch.from_numpy((bf16.astype(np.uint32) << 16).view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, HERE / "blocks.safetensors", metadata={"format": "pt"})


def interleave(weight, heads):
    """The row order in which GGUF stores q and k of a Llama."""
    return (weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2).reshape(weight.shape))


def llama_files():
    rng = np.random.default_rng(3)
    hidden, inter, heads, kv_heads, dim, vocab = 24, 40, 4, 2, 6, 11
    shapes = {"self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv_heads * dim, hidden),
              "self_attn.v_proj": (kv_heads * dim, hidden), "self_attn.o_proj": (hidden, heads * dim),
              "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
              "mlp.down_proj": (hidden, inter), "input_layernorm": (hidden,),
              "post_attention_layernorm": (hidden,)}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}

    writer = gguf.GGUFWriter(HERE / "llama.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_vocab_size(vocab)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    tensors = {}

    def add(name, stored_name, shape, heads=0):
        value = rng.normal(0, 1, shape).astype(np.float32)
        tensors[name] = torch.from_numpy(value)
        writer.add_tensor(stored_name, np.ascontiguousarray(interleave(value, heads)) if heads else value)

    add("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
    add("model.norm.weight", "output_norm.weight", (hidden,))
    add("lm_head.weight", "output.weight", (vocab, hidden))
    for layer in range(2):
        for name, shape in shapes.items():
            add(f"model.layers.{layer}.{name}.weight", f"blk.{layer}.{names[name]}.weight", shape,
                {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name, 0))
        for name, count in (("q", heads), ("k", kv_heads)):
            add(f"model.layers.{layer}.self_attn.{name}_proj.bias", f"blk.{layer}.attn_{name}.bias",
                (count * dim,), count)
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 8], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = HERE / "llama"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inter,
              "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "head_dim": dim, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
              "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
              "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
              "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    reference_file()
    block_files()
    llama_files()
    (HERE / "versions.json").write_text(
        json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}) + "\n")
