// A checkpoint of the tiny model, for what reads one.
#pragma once
#include <nlohmann/json.hpp>

#include "data/safetensors.h"
#include "nn/llama.h"
#include "nn/load.h"
#include "tests/support/files.h"

namespace qlab::test {

/// The tiny model as a directory, whose configuration says `layers`; `extras` lie beside its
/// tensors.
inline std::string write_model(const TemporaryFolder& folder, int64_t layers, bool tied,
                               const std::vector<std::string>& extras = {}) {
  LlamaConfig c = synthetic_config("tiny");
  c.tie_word_embeddings = tied;
  std::vector<std::pair<std::string, Tensor>> tensors;
  Llama(c, {WeightFormat::bf16}, DType::bf16, Device::cpu(),
        [&](const std::string& name, const Shape& shape) {
          tensors.emplace_back(name, Tensor::zeros(shape, DType::bf16, Device::cpu()));
          return tensors.back().second;
        });
  for (const std::string& name : extras)
    tensors.emplace_back(name, Tensor::zeros({4}, DType::bf16, Device::cpu()));
  write_safetensors(folder / "model.safetensors", tensors);
  folder.write("config.json", nlohmann::json{{"model_type", "llama"},
                                             {"architectures", {"LlamaForCausalLM"}},
                                             {"vocab_size", c.vocab_size},
                                             {"hidden_size", c.hidden_size},
                                             {"intermediate_size", c.intermediate_size},
                                             {"num_hidden_layers", layers},
                                             {"num_attention_heads", c.num_attention_heads},
                                             {"num_key_value_heads", c.num_key_value_heads},
                                             {"head_dim", c.head_dim},
                                             {"max_position_embeddings", c.max_position_embeddings},
                                             {"rms_norm_eps", c.rms_norm_eps},
                                             {"rope_theta", c.rope_theta},
                                             {"tie_word_embeddings", tied}}
                                  .dump());
  return folder.path();
}

}  // namespace qlab::test
