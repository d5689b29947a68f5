// A GGUF file read through Hugging Face's names: metadata becomes a config, blk.N.attn_q becomes
// model.layers.N.self_attn.q_proj, and the row order of q and k is restored.
#include <array>
#include <map>

#include "core/error.h"
#include "core/parallel.h"
#include "data/checkpoint_formats.h"
#include "data/gguf.h"
#include "data/safetensors.h"

namespace qlab {
namespace {

constexpr const char* rope_divisors_name = "rope_freqs.weight";

struct NamePair {
  const char *gguf, *huggingface;
};
constexpr std::array<NamePair, 3> global_names = {
    {{"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}}};
constexpr std::array<NamePair, 9> layer_names = {{{"attn_norm", "input_layernorm"},
                                                  {"attn_q", "self_attn.q_proj"},
                                                  {"attn_k", "self_attn.k_proj"},
                                                  {"attn_v", "self_attn.v_proj"},
                                                  {"attn_output", "self_attn.o_proj"},
                                                  {"ffn_norm", "post_attention_layernorm"},
                                                  {"ffn_gate", "mlp.gate_proj"},
                                                  {"ffn_up", "mlp.up_proj"},
                                                  {"ffn_down", "mlp.down_proj"}}};

/// "blk.3.attn_q.weight" to "model.layers.3.self_attn.q_proj.weight"; "" for an unknown name.
std::string huggingface_name(const std::string& name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string::npos) return "";
  const std::string stem = name.substr(0, dot), suffix = name.substr(dot);
  for (const NamePair& pair : global_names)
    if (stem == pair.gguf) return pair.huggingface + suffix;
  if (!stem.starts_with("blk.")) return "";
  const size_t end = stem.find('.', 4);
  if (end == std::string::npos) return "";
  for (const NamePair& pair : layer_names)
    if (stem.substr(end + 1) == pair.gguf)
      return fmt::format("model.layers.{}.{}{}", stem.substr(4, end - 4), pair.huggingface, suffix);
  return "";
}

nlohmann::json rope_scaling(const GgufFile& file, const std::string& prefix) {
  const auto type = file.get<std::string>(prefix + "rope.scaling.type", "none");
  if (type == "none") return nullptr;
  nlohmann::json scaling = {{"rope_type", type},
                            {"factor", file.get<double>(prefix + "rope.scaling.factor")}};
  const std::string length = prefix + "rope.scaling.original_context_length";
  if (file.metadata().contains(length))
    scaling["original_max_position_embeddings"] = file.get<int64_t>(length);
  return scaling;
}

nlohmann::json translate_config(const GgufFile& file) {
  const auto architecture = file.get<std::string>("general.architecture");
  if (architecture != "llama" && architecture != "qwen2")
    fail("{}: architecture \"{}\" is not supported (llama and qwen2 are)", file.path(),
         architecture);
  if (file.get<std::string>("general.type", "model") != "model")
    fail("{}: holds no model but: {}", file.path(), file.get<std::string>("general.type"));
  if (file.get<int64_t>("split.count", 1) > 1)
    fail("{}: is one part of a split model; join the parts with llama-gguf-split --merge",
         file.path());
  const std::string prefix = architecture + ".";
  const auto integer = [&](const char* key) { return file.get<int64_t>(prefix + key); };
  const int64_t hidden = integer("embedding_length"), heads = integer("attention.head_count");
  if (hidden <= 0 || heads <= 0)
    fail("{}: embedding_length and head_count must be > 0", file.path());
  const auto tokens = file.metadata().find("tokenizer.ggml.tokens");
  const int64_t token_count =
      tokens != file.metadata().end() ? static_cast<int64_t>(tokens->size()) : 0;
  nlohmann::json config = {
      {"architectures", {architecture == "llama" ? "LlamaForCausalLM" : "Qwen2ForCausalLM"}},
      {"model_type", architecture},
      {"vocab_size", file.get<int64_t>(prefix + "vocab_size", token_count)},
      {"hidden_size", hidden},
      {"intermediate_size", integer("feed_forward_length")},
      {"num_hidden_layers", integer("block_count")},
      {"num_attention_heads", heads},
      {"num_key_value_heads", file.get<int64_t>(prefix + "attention.head_count_kv", heads)},
      {"head_dim", file.get<int64_t>(prefix + "attention.key_length", hidden / heads)},
      {"hidden_act", "silu"},
      {"max_position_embeddings", integer("context_length")},
      {"rms_norm_eps", file.get<double>(prefix + "attention.layer_norm_rms_epsilon")},
      {"rope_theta", file.get<double>(prefix + "rope.freq_base", 10000.0)},
      {"rope_scaling", rope_scaling(file, prefix)},
      {"attention_bias", file.tensors().contains("blk.0.attn_output.bias")},
      {"mlp_bias", file.tensors().contains("blk.0.ffn_down.bias")},
      {"tie_word_embeddings", !file.tensors().contains("output.weight")}};
  for (const char* token : {"bos", "eos"}) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", token);
    if (file.metadata().contains(key))
      config[fmt::format("{}_token_id", token)] = file.get<int64_t>(key);
  }
  return config;
}

class GgufCheckpoint final : public Checkpoint {
 public:
  explicit GgufCheckpoint(GgufFile file)
      : Checkpoint(file.path(), translate_config(file)), file_(std::move(file)) {
    for (const auto& [name, tensor] : file_.tensors()) {
      if (name == rope_divisors_name) continue;
      const std::string translated = huggingface_name(name);
      if (translated.empty())
        fail("{}: tensor \"{}\" has no place in a {} model", path_, name,
             config_["model_type"].get<std::string>());
      gguf_name_[translated] = name;
    }
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, gguf_name] : gguf_name_) result.push_back(name);
    return result;
  }
  bool contains(const std::string& name) const override { return gguf_name_.contains(name); }
  Shape shape(const std::string& name) const override {
    return to_shape(tensor(name).shape, fmt::format("{}: tensor \"{}\"", path_, name));
  }
  std::string source_dtype(const std::string& name) const override {
    return info_of(tensor(name).encoding).name;
  }

  Tensor read(const std::string& name, DType dtype) const override {
    const GgufTensor& source = tensor(name);
    const std::byte* bytes = file_.bytes(source).data();
    Tensor result = Tensor::empty(shape(name), dtype, Device::cpu());
    const bool bias = source.shape.size() == 1;
    const int64_t cols = bias ? 1 : source.shape.back();
    const int64_t rows = cols == 0 ? 0 : result.numel() / cols;
    const int64_t half = interleaved_half(name, rows);
    const auto [encoding_name, block_elems, block_bytes] = info_of(source.encoding);
    if (half == 0) {
      const int64_t blocks = result.numel() / block_elems;
      parallel_for(blocks, 1024, [&](int64_t begin, int64_t end) {
        decode(source.encoding, bytes + begin * block_bytes, (end - begin) * block_elems, dtype,
               element(result, begin * block_elems));
      });
      return result;
    }
    if (cols % block_elems != 0)
      fail("{}: the rows of tensor \"{}\" cannot be put in order in {}", path_, name,
           encoding_name);
    const int64_t row_bytes = cols / block_elems * block_bytes;
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        decode(source.encoding, bytes + stored_row(row, half) * row_bytes, cols, dtype,
               element(result, row * cols));
    });
    return result;
  }

  std::vector<float> rope_divisors() const override {
    const auto found = file_.tensors().find(rope_divisors_name);
    if (found == file_.tensors().end()) return {};
    const GgufTensor& source = found->second;
    std::vector<float> result(source.bytes /
                              static_cast<uint64_t>(info_of(source.encoding).block_bytes) *
                              static_cast<uint64_t>(info_of(source.encoding).block_elems));
    decode_to_float(source.encoding, file_.bytes(source).data(),
                    static_cast<int64_t>(result.size()), result.data());
    return result;
  }

  std::string fingerprint(const std::function<void()>& between_tensors) const override {
    Fingerprint result;
    result.add(file_.header());
    for (const auto& [name, tensor] : file_.tensors()) {
      between_tensors();
      result.add_in_blocks(file_.bytes(tensor));
    }
    return result.hex();
  }

 private:
  static std::byte* element(const Tensor& tensor, int64_t index) {
    return static_cast<std::byte*>(tensor.raw()) +
           index * static_cast<int64_t>(size_of(tensor.dtype()));
  }

  const GgufTensor& tensor(const std::string& name) const {
    const auto found = gguf_name_.find(name);
    if (found == gguf_name_.end()) fail("{}: there is no tensor \"{}\"", path_, name);
    return file_.tensors().at(found->second);
  }

  /// Half the head dimension where rows are stored for interleaved rotation (q and k of
  /// architecture llama), otherwise 0.
  int64_t interleaved_half(const std::string& name, int64_t rows) const {
    const bool q = name.find("self_attn.q_proj") != std::string::npos;
    const bool k = name.find("self_attn.k_proj") != std::string::npos;
    if (config_["model_type"] != "llama" || (!q && !k)) return 0;
    const auto heads = config_[q ? "num_attention_heads" : "num_key_value_heads"].get<int64_t>();
    if (heads <= 0 || rows % (2 * heads) != 0)
      fail("{}: tensor \"{}\" has {} rows, which do not divide into {} heads", path_, name, rows,
           heads);
    return rows / heads / 2;
  }

  /// Row h d + s d/2 + i of Hugging Face is stored as row h d + 2 i + s; half = d/2.
  static int64_t stored_row(int64_t row, int64_t half) {
    const int64_t head = row / (2 * half), s = row / half % 2, i = row % half;
    return head * 2 * half + 2 * i + s;
  }

  GgufFile file_;
  std::map<std::string, std::string> gguf_name_;
};

}  // namespace

std::unique_ptr<Checkpoint> open_gguf(const std::string& path) {
  return std::make_unique<GgufCheckpoint>(GgufFile(path));
}

}  // namespace qlab
