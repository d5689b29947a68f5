// How fast a run is against the hardware.
#pragma once
#include <string>
#include <vector>

#include "nn/llama_config.h"

namespace qlab {

/// Floating-point operations that training on one sequence of `length` tokens needs: 4 per weight
/// of the frozen linear modules and of lm_head and token (forward, and the gradient of its input; a
/// frozen weight has none), and 6 length^2 heads head_dim per layer for causal attention (two
/// products forward and four backward, each half of length x length). Recomputation, adapters,
/// norms and softmax do not count.
double model_flops(const LlamaConfig& config, int64_t length);

/// The datasheet's dense bf16 FLOP/s (fp16 where there is no bf16) of a GPU by the name that its
/// driver gives; 0 when unknown.
double peak_flops(const std::string& device_name);

/// Of at least one value; of an even number the mean of the middle two.
double median(std::vector<double> values);

}  // namespace qlab
