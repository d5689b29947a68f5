#include "nn/llama_config.h"

#include <nlohmann/json.hpp>

#include "core/error.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

class Reader {
 public:
  Reader(const Json& json, const std::string& where) : json_(json), where_(where) {}

  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }

  int64_t count(const char* key, int64_t missing) const {
    if (!has(key)) return missing;
    const Json& value = json_.at(key);
    if (!value.is_number_integer() || value.get<int64_t>() <= 0)
      fail("{}: {} must be a positive integer, got {}", where_, key, value.dump());
    return value.get<int64_t>();
  }
  double number(const char* key, double missing) const {
    if (!has(key)) return missing;
    if (!json_.at(key).is_number())
      fail("{}: {} must be a number, got {}", where_, key, json_.at(key).dump());
    return json_.at(key).get<double>();
  }
  bool flag(const char* key, bool missing) const {
    if (!has(key)) return missing;
    if (!json_.at(key).is_boolean())
      fail("{}: {} must be true or false, got {}", where_, key, json_.at(key).dump());
    return json_.at(key).get<bool>();
  }
  std::string text(const char* key, const std::string& missing) const {
    if (!has(key)) return missing;
    if (!json_.at(key).is_string())
      fail("{}: {} must be text, got {}", where_, key, json_.at(key).dump());
    return json_.at(key).get<std::string>();
  }

 private:
  const Json& json_;
  const std::string& where_;
};

// Transformers 4 has rope_theta and rope_scaling {type | rope_type, ...}; 5 has one
// rope_parameters.
void read_rope(LlamaConfig& config, const Json& json, const std::string& where) {
  const Reader top(json, where);
  config.rope_theta = top.number("rope_theta", 10000);
  const char* key = top.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!top.has(key)) return;
  if (!json.at(key).is_object()) fail("{}: {} must be an object", where, key);
  const Reader rope(json.at(key), where);
  config.rope_theta = rope.number("rope_theta", config.rope_theta);
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type == "default") return;
  if (type != "llama3")
    fail("{}: RoPE scaling '{}' is not supported; supported: default, llama3", where, type);
  config.rope_scaling = RopeScaling{static_cast<float>(rope.number("factor", 8)),
                                    static_cast<float>(rope.number("low_freq_factor", 1)),
                                    static_cast<float>(rope.number("high_freq_factor", 4)),
                                    rope.count("original_max_position_embeddings", 8192)};
}

}  // namespace

std::string LlamaConfig::class_prefix() const {
  if (model_type == "mistral") return "Mistral";
  if (model_type == "qwen2") return "Qwen2";
  return "Llama";
}

LlamaConfig llama_config_from_json(const Json& json, const std::string& where) {
  if (!json.is_object()) fail("{}: a model configuration must be a JSON object", where);
  const Reader in(json, where);
  LlamaConfig c;
  c.model_type = in.text("model_type", "llama");
  if (c.model_type != "llama" && c.model_type != "mistral" && c.model_type != "qwen2")
    fail("{}: model_type '{}' is not supported; supported: llama, mistral, qwen2", where,
         c.model_type);
  if (in.has("quantization_config"))
    fail(
        "{}: the checkpoint is already quantized (quantization_config); give the original 16-bit "
        "checkpoint, qlab quantizes it as quant.type says",
        where);
  c.vocab_size = in.count("vocab_size", 32000);
  c.hidden_size = in.count("hidden_size", 4096);
  c.intermediate_size = in.count("intermediate_size", 11008);
  c.num_hidden_layers = in.count("num_hidden_layers", 32);
  c.num_attention_heads = in.count("num_attention_heads", 32);
  c.num_key_value_heads = in.count("num_key_value_heads", c.num_attention_heads);
  c.head_dim = in.count("head_dim", c.hidden_size / c.num_attention_heads);
  c.max_position_embeddings = in.count("max_position_embeddings", 2048);
  c.rms_norm_eps = in.number("rms_norm_eps", 1e-6);
  c.tie_word_embeddings = in.flag("tie_word_embeddings", false);
  read_rope(c, json, where);
  const std::string activation = in.text("hidden_act", "silu");
  if (activation != "silu")
    fail("{}: hidden_act '{}' is not supported; supported: silu", where, activation);
  if (c.num_attention_heads % c.num_key_value_heads != 0)
    fail("{}: num_attention_heads {} is no multiple of num_key_value_heads {}", where,
         c.num_attention_heads, c.num_key_value_heads);
  if (c.head_dim <= 0 || c.head_dim % 8 != 0 || c.head_dim > 256)
    fail("{}: head_dim {} is not supported; it must be a multiple of 8 up to 256", where,
         c.head_dim);
  if (in.has("sliding_window") && in.flag("use_sliding_window", c.model_type == "mistral"))
    fail("{}: sliding-window attention (sliding_window {}) is not supported", where,
         json.at("sliding_window").dump());
  c.qkv_bias = c.model_type == "qwen2" || in.flag("attention_bias", false);
  c.o_bias = c.model_type == "llama" && in.flag("attention_bias", false);
  c.mlp_bias = c.model_type == "llama" && in.flag("mlp_bias", false);
  return c;
}

LlamaConfig synthetic_config(const std::string& name) {
  struct Row {
    const char* name;
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, positions;
    double eps, theta;
    bool tied;
  };
  static constexpr Row rows[] = {
      {"llama-3.1-8b", 128256, 4096, 14336, 32, 32, 8, 131072, 1e-5, 500000, false},
      {"llama-3.1-70b", 128256, 8192, 28672, 80, 64, 8, 131072, 1e-5, 500000, false},
      {"llama-2-7b", 32000, 4096, 11008, 32, 32, 32, 4096, 1e-5, 10000, false},
      {"llama-2-70b", 32000, 8192, 28672, 80, 64, 8, 4096, 1e-5, 10000, false},
      {"llama-2-13b", 32000, 5120, 13824, 40, 40, 40, 4096, 1e-5, 10000, false},
      {"llama-7b", 32000, 4096, 11008, 32, 32, 32, 2048, 1e-6, 10000, false},
      {"llama-13b", 32000, 5120, 13824, 40, 40, 40, 2048, 1e-6, 10000, false},
      {"llama-33b", 32000, 6656, 17920, 60, 52, 52, 2048, 1e-6, 10000, false},
      {"llama-65b", 32000, 8192, 22016, 80, 64, 64, 2048, 1e-5, 10000, false},
      {"qwen2.5-7b", 152064, 3584, 18944, 28, 28, 4, 32768, 1e-6, 1000000, false},
      {"smollm2-135m", 49152, 576, 1536, 30, 9, 3, 8192, 1e-5, 100000, true},
      {"tiny-deep", 512, 64, 160, 6, 4, 2, 512, 1e-5, 10000, false},
      {"tiny", 512, 64, 160, 2, 4, 2, 512, 1e-5, 10000, true},
  };
  std::string known;
  for (const Row& row : rows) {
    known += (known.empty() ? "" : ", ") + std::string(row.name);
    if (name != row.name) continue;
    LlamaConfig c;
    c.vocab_size = row.vocab, c.hidden_size = row.hidden, c.intermediate_size = row.intermediate;
    c.num_hidden_layers = row.layers, c.num_attention_heads = row.heads;
    c.num_key_value_heads = row.kv_heads, c.head_dim = row.hidden / row.heads;
    c.max_position_embeddings = row.positions;
    c.rms_norm_eps = row.eps, c.rope_theta = row.theta, c.tie_word_embeddings = row.tied;
    if (name.starts_with("llama-3.1")) c.rope_scaling = RopeScaling{};
    if (name.starts_with("qwen")) c.model_type = "qwen2", c.qkv_bias = true;
    c.source_dtype = "synthetic";
    return c;
  }
  fail("synthetic:{}: unknown model; known: {}", name, known);
}

}  // namespace qlab
