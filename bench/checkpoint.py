"""Checkpoints of random 16-bit weights in Hugging Face layout, for timing how they are read."""

import json
import random
import struct

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONFIGS = {
    "llama-3.1-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                         max_position_embeddings=131072, rope_theta=500000.0,
                         rope_scaling=LLAMA3_ROPE),
    "tiny": dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
                 rope_theta=10000.0)}
PERIOD = 1000003  # values, a prime: no two rows begin at the same one


def shapes(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {prefix + f"self_attn.{name}_proj.weight": (rows, hidden)
                  for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))}
        found |= {prefix + "mlp.gate_proj.weight": (inner, hidden),
                  prefix + "mlp.up_proj.weight": (inner, hidden),
                  prefix + "mlp.down_proj.weight": (hidden, inner),
                  prefix + "input_layernorm.weight": (hidden,),
                  prefix + "post_attention_layernorm.weight": (hidden,)}
    return found | {"model.norm.weight": (hidden,),
                    "lm_head.weight": (config["vocab_size"], hidden)}


def random_bf16(count):
    """Of either sign, 2^-7 to 2^-5 in size: the exponent's bits lie in both bytes."""
    generator = random.Random(0)
    high = bytes(0xbc if byte & 1 else 0x3c for byte in range(256))
    values = bytearray(2 * count)
    values[0::2] = generator.randbytes(count)
    values[1::2] = generator.randbytes(count).translate(high)
    return values


def write(folder, name, positions=0):
    """A checkpoint of that name's shapes; for `positions` at least."""
    config = dict(CONFIGS[name])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], positions)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
               "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    sizes = []
    for tensor, shape in shapes(config).items():
        sizes.append((len(shape), 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)))
        header[tensor] = {"dtype": "BF16", "shape": list(shape),
                          "data_offsets": [offset, offset + sizes[-1][1]]}
        offset += sizes[-1][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    values = memoryview(random_bf16(PERIOD))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for rank, size in sizes:
            if rank == 1:
                file.write(b"\x80\x3f" * (size // 2))
                continue
            for begin in range(0, size, len(values)):
                file.write(values[:min(len(values), size - begin)])
