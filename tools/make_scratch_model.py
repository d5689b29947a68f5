#!/usr/bin/env python3
"""Writes a small Llama with random weights and a byte-level tokenizer, as a Hugging Face directory.

The demo trains it from scratch when the real model cannot be had: full-rank adapters on every linear
layer reach every value of those layers' weights. Only Python's standard library is needed.

    tools/make_scratch_model.py --out models/scratch
"""
import argparse
import array
import json
import os
import random
import struct
import sys
import tempfile

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 96, 256, 3, 6, 3
END = "<|endoftext|>"


def byte_symbols():
    """The printable stand-ins of byte-level BPE, in the order of the bytes they stand for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for count, byte in enumerate(b for b in range(256) if b not in symbols):
        symbols[byte] = chr(256 + count)
    return [symbols[byte] for byte in range(256)]


def tokenizer():
    vocab = {symbol: index for index, symbol in enumerate(byte_symbols())}
    vocab[END] = 256
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": 256, "content": END, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None, "pre_tokenizer": level, "post_processor": level, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []},
    }


def config():
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "eos_token_id": 256, "torch_dtype": "float32",
    }


def tensors():
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"model.embed_tokens.weight": (257, HIDDEN), "lm_head.weight": (257, HIDDEN),
              "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    generator = random.Random(0)
    for name in sorted(shapes):
        shape = shapes[name]
        if len(shape) == 1:
            yield name, shape, array.array("f", [1.0] * shape[0])
        else:
            # Unit embeddings; everything else keeps the size of what passes through it.
            std = 1.0 if "embed" in name else shape[1] ** -0.5
            yield name, shape, array.array(
                "f", (generator.gauss(0.0, std) for _ in range(shape[0] * shape[1])))


def safetensors():
    header, data, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape, values in tensors():
        if sys.byteorder == "big":
            values.byteswap()
        raw = values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape),
                        "data_offsets": [offset, offset + len(raw)]}
        data.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="directory to write")
    out = parser.parse_args().out
    os.makedirs(out, exist_ok=True)
    files = {"config.json": json.dumps(config(), indent=2).encode(),
             "tokenizer.json": json.dumps(tokenizer()).encode(),
             "model.safetensors": safetensors()}
    for name, content in files.items():
        with tempfile.NamedTemporaryFile(dir=out, delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, os.path.join(out, name))
    print(f"{out}: a Llama of {LAYERS} layers, hidden size {HIDDEN}, random weights")


if __name__ == "__main__":
    main()
