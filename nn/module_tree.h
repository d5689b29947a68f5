// A model on paper: its module tree as Transformers and PEFT print it, parameter counts, and bytes.
// Nothing is loaded; everything follows from the configuration.
#pragma once
#include <optional>
#include <string>

#include "nn/llama_config.h"
#include "nn/lora.h"
#include "quant/weight.h"

namespace qlab {

struct ModelCount {
  int64_t linear = 0;     // weights of the layers' linears
  int64_t other = 0;      // embeddings, head, norms, biases
  int64_t trainable = 0;  // LoRA
  int64_t all() const { return linear + other + trainable; }
};
ModelCount count_parameters(const LlamaConfig& config, const std::optional<LoraSpec>& lora);

/// Hugging Face's get_memory_footprint: parameters only, no quantization constants; 16-bit where
/// not quantized (32-bit with quant.type fp32); LoRA in its own dtype.
int64_t hf_footprint(const LlamaConfig& config, const WeightSpec& spec,
                     const std::optional<LoraSpec>& lora);
/// The same, with the quantization constants and tables that the device really holds.
int64_t resident_bytes(const LlamaConfig& config, const WeightSpec& spec,
                       const std::optional<LoraSpec>& lora);

std::string module_tree(const LlamaConfig& config, const WeightSpec& spec,
                        const std::optional<LoraSpec>& lora);

/// "trainable params: 27,262,976 || all params: 8,057,524,224 || trainable%: 0.3384"
std::string trainable_line(const ModelCount& count);
std::string with_commas(int64_t value);

/// Names and shapes of the layers' linears, in order.
std::vector<Adapter::Shape> linear_shapes(const LlamaConfig& config);

}  // namespace qlab
