"""The parts of qlab that need a second opinion, in numpy, from the specifications alone.

GGUF files (F32, Q8_0, Q4_1), NF4 with double quantization as bitsandbytes stores it, Philox4x32-10
and the initial values of LoRA A; and from them a Transformers model with PEFT's LoRA on it. Needs
numpy; torch, transformers and peft only for the functions that build models.
"""

import functools
import hashlib
import mmap
import struct

import numpy as np

# ---- GGUF -------------------------------------------------------------------------------------

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm",
                "output": "lm_head"}
LAYER_NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
               "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
               "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
               "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class _Cursor:
    def __init__(self, data):
        self.data, self.at = data, 0

    def scalar(self, form):
        value, = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self):
        length = self.scalar("<Q")
        self.at += length
        return self.data[self.at - length:self.at].decode("utf-8", "surrogateescape")

    def value(self, kind):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            element, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(element) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def _decode(kind, data, count):
    """Blocks of 32: Q8_0 is d (f16), 32 int8; Q4_1 is d, m (f16), 16 bytes, low nibbles first."""
    if kind == F32:
        return np.frombuffer(data, "<f4", count).astype(np.float32)
    blocks = count // 32
    if kind == Q8_0:
        raw = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", 32)]), blocks)
        return (raw["d"].astype(np.float32)[:, None] * raw["q"].astype(np.float32)).ravel()
    if kind == Q4_1:
        raw = np.frombuffer(data, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), blocks)
        q = np.concatenate([raw["q"] & 15, raw["q"] >> 4], axis=1).astype(np.float32)
        d, m = (raw[k].astype(np.float32)[:, None] for k in "dm")
        return (d * q + m).ravel()
    raise ValueError(f"GGUF tensor type {kind} is not read here")


def _hf_name(name):
    stem, suffix = name.rsplit(".", 1)
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{suffix}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def read_gguf(path):
    """Metadata, and the tensors in float32 under their Transformers names and row orders."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    assert data[:4] == b"GGUF" and struct.unpack_from("<I", data, 4)[0] == 3, path
    cursor.at = 8
    tensor_count, key_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    entries = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = [cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))][::-1]
        entries.append((name, shape, cursor.scalar("<I"), cursor.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    heads = {"q_proj": metadata["llama.attention.head_count"],
             "k_proj": metadata["llama.attention.head_count_kv"]}
    tensors = {}
    for name, shape, kind, offset in entries:
        values = _decode(kind, memoryview(data)[base + offset:], int(np.prod(shape)))
        values, name = values.reshape(shape), _hf_name(name)
        projection = name.split(".")[-2]
        if projection in heads:  # GGUF rotates neighbours, Transformers halves of a head
            n = heads[projection]
            values = values.reshape(n, shape[0] // n // 2, 2, shape[1]).swapaxes(1, 2)
            values = values.reshape(shape)
        tensors[name] = np.ascontiguousarray(values)
    return metadata, tensors


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- NF4 with double quantization ----------------------------------------------------------------

NF4 = np.array([0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871,
                0x00000000, 0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB,
                0x3F3913B3, 0x3F800000], np.uint32).view(np.float32)
NF4_THRESHOLDS = np.array([0xBF591CD9, 0xBF1C5270, 0xBEEB8480, 0xBEADEA76, 0xBE703CEC, 0xBE0D38BC,
                           0xBD3A7871, 0x3D22FAFF, 0x3DF64863, 0x3E5067E0, 0x3E9582D4, 0x3EC753F9,
                           0x3F006D03, 0x3F248DAF, 0x3F5C89D9], np.uint32).view(np.float32)
NESTED_BLOCK = 256
DYNAMIC_MAP_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def _dynamic_map():
    f32 = np.float32
    values = [f32(0), f32(1)]
    for i in range(7):
        n = 2**i
        step = np.float64((f32(1) - f32(0.1)) / f32(n))
        # In float64 these sums are exact: one rounding to float32 makes them fused.
        points = [f32(step * j + np.float64(f32(0.1))) if j < (n + 1) // 2 else
                  f32(1.0 - step * (n - j)) for j in range(n + 1)]
        for a, b in zip(points, points[1:]):
            mean = f32(10.0**(i - 6)) * (f32(a + b) / f32(2))
            values += [mean, -mean]
    result = np.sort(np.array(values, np.float32))
    assert hashlib.sha256(result.tobytes()).hexdigest() == DYNAMIC_MAP_SHA256
    return result


DYNAMIC_MAP = _dynamic_map()
DYNAMIC_MIDPOINTS = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) * np.float32(0.5)


def _blocks(flat, size):
    padded = np.zeros(-(-flat.size // size) * size, np.float32)
    padded[:flat.size] = flat
    return padded.reshape(-1, size)


def _scaled(blocks):
    """Each block over its largest magnitude, through the reciprocal, and those magnitudes."""
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return blocks * (np.float32(1) / largest)[:, None], largest


def quantize_nf4(weight, block_size=64):
    """Codes (one a byte), codes of the scales, their scales, and the offset."""
    scaled, absmax = _scaled(_blocks(weight.ravel(), block_size))
    codes = np.searchsorted(NF4_THRESHOLDS, scaled, "left")  # thresholds strictly exceeded
    codes = np.where(np.isnan(scaled), 0, codes).astype(np.uint8).ravel()[:weight.size]
    offset = np.float32(absmax.astype(np.float64).mean())
    nested, absmax2 = _scaled(_blocks(absmax - offset, NESTED_BLOCK))
    nested_codes = np.searchsorted(DYNAMIC_MIDPOINTS, nested, "left")
    tie = nested == DYNAMIC_MIDPOINTS[np.minimum(nested_codes, 254)]
    nested_codes += tie & (nested_codes % 2 == 1)
    nested_codes = np.where(np.isnan(nested), 0, nested_codes).astype(np.uint8)
    return codes, nested_codes.ravel()[:absmax.size], absmax2, offset


def dequantize_nf4(quantized, shape, block_size=64):
    codes, nested_codes, absmax2, offset = quantized
    scale = DYNAMIC_MAP[nested_codes] * np.repeat(absmax2, NESTED_BLOCK)[:nested_codes.size]
    scale = scale + offset
    return (NF4[codes] * np.repeat(scale, block_size)[:codes.size]).reshape(shape)


# ---- Random numbers ----------------------------------------------------------------------------------


def philox(key, c0, c1, c2=0, c3=0):
    """Philox4x32-10 over arrays of counters: an array [..., 4] of uint32."""
    mask, u64 = np.uint64(0xFFFFFFFF), np.uint64
    c = [np.asarray(x, u64) for x in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c[0] * u64(0xD2511F53), c[2] * u64(0xCD9E8D57)
        c = [(p1 >> u64(32)) ^ c[1] ^ u64(k0), p1 & mask, (p0 >> u64(32)) ^ c[3] ^ u64(k1),
             p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def stream_key(seed, name):
    """FNV-1a of the name, then splitmix64's finalizer with the seed."""
    mask = (1 << 64) - 1
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & mask
    z = (h + (seed + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def lora_a(seed, module, r, columns):
    """Uniform in +-1/sqrt(columns); element (row, col) is lane col % 4 of counter (col / 4, row)."""
    rows = np.arange(r)[:, None]
    lanes = philox(stream_key(seed, module + ".lora_A"), np.arange(-(-columns // 4))[None, :], rows)
    uniform = (lanes.reshape(r, -1)[:, :columns] >> 8).astype(np.float32) * np.float32(2.0**-24)
    bound = np.float32(1) / np.sqrt(np.float32(columns))
    return (np.float32(2) * uniform - np.float32(1)) * bound


# ---- Models ------------------------------------------------------------------------------------------

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_llama(path, quant="nf4", dtype=None, attention="sdpa"):
    """LlamaForCausalLM of a GGUF file; quant "nf4" passes the linears through NF4 and back."""
    import torch
    import transformers

    metadata, tensors = read_gguf(path)
    get = lambda key: metadata["llama." + key]
    heads = get("attention.head_count")
    config = transformers.LlamaConfig(
        vocab_size=get("vocab_size"), hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"), num_hidden_layers=get("block_count"),
        num_attention_heads=heads, num_key_value_heads=get("attention.head_count_kv"),
        head_dim=get("embedding_length") // heads, max_position_embeddings=get("context_length"),
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in tensors, attention_bias=False, mlp_bias=False,
        use_cache=False)
    config._attn_implementation = attention
    dtype = dtype or torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    state = {}
    for name, values in tensors.items():
        if quant == "nf4" and name.split(".")[-2] in LINEARS:
            values = dequantize_nf4(quantize_nf4(values), values.shape)
        state[name] = torch.from_numpy(values).to(dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model.eval()


def add_lora(model, r, alpha, targets, seed):
    """PEFT's LoRA with qlab's initial values: A from the seed, B zero; fp32."""
    import peft
    import torch

    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0,
                             bias="none", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            assert parameter.dtype == torch.float32 and parameter.requires_grad
            if "lora_B" in name:
                parameter.zero_()
            else:
                module = name.removeprefix("base_model.model.").split(".lora_A")[0]
                parameter.copy_(torch.from_numpy(lora_a(seed, module, r, parameter.shape[1])))
    return model


def in_double(model):
    """The same model in float64 throughout, also where Transformers computes in float32 by itself:
    RMSNorm and RoPE."""
    import torch
    from transformers.models.llama import modeling_llama as llama

    def norm(module, h):
        square = h.pow(2).mean(-1, keepdim=True)
        return module.weight * (h * torch.rsqrt(square + module.variance_epsilon))

    def rope(config, x, position_ids):
        assert x.dtype == torch.float64 and config.rope_parameters["rope_type"] == "default"
        exponents = torch.arange(0, config.head_dim, 2, dtype=x.dtype) / config.head_dim
        angles = position_ids[..., None] / config.rope_parameters["rope_theta"] ** exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    for module in model.modules():
        if isinstance(module, llama.LlamaRMSNorm):
            module.forward = functools.partial(norm, module)
        elif isinstance(module, llama.LlamaRotaryEmbedding):
            module.forward = functools.partial(rope, module.config)
    return model.double()
