// The shape of a Llama-family model, from config.json (the spellings of Transformers 4 and 5) or a
// name of the built-in table.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/ops/rope.h"

namespace qlab {

struct LlamaConfig {
  std::string model_type = "llama";  // llama | mistral | qwen2
  int64_t vocab_size = 32000, hidden_size = 4096, intermediate_size = 11008;
  int64_t num_hidden_layers = 32, num_attention_heads = 32, num_key_value_heads = 32;
  int64_t head_dim = 128, max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6, rope_theta = 10000;
  std::optional<RopeScaling> rope_scaling;
  std::vector<float> rope_divisors;  // GGUF's rope_freqs.weight
  bool tie_word_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  std::string source_dtype;  // of the checkpoint's linears: "BF16", "Q4_1", ...

  int64_t q_size() const { return num_attention_heads * head_dim; }
  int64_t kv_size() const { return num_key_value_heads * head_dim; }
  /// "Llama", "Mistral", "Qwen2": the prefix of Transformers' class names.
  std::string class_prefix() const;
};

/// `where` names the file in errors. Unsupported architectures and settings are refused.
LlamaConfig llama_config_from_json(const nlohmann::json& json, const std::string& where);

/// The built-in shapes: llama-3.1-8b, llama-3.1-70b, llama-2-7b, llama-2-13b, llama-7b, llama-13b,
/// llama-33b, llama-65b, qwen2.5-7b, smollm2-135m, tiny. Error with the list when unknown.
LlamaConfig synthetic_config(const std::string& name);

}  // namespace qlab
