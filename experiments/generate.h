// Text from a model, token by token, so that a person sees that it is really there.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "nn/llama.h"

namespace qlab {

struct SamplingOptions {
  int64_t max_new_tokens = 128;
  double temperature = 0;  // 0: the most likely token
  double top_p = 1;        // the smallest set of tokens whose probability reaches it
  uint64_t seed = 0;
};

/// Ends at one of `stop_ids`, or when `token` returns false. Number i is drawn from (seed, i).
std::vector<int32_t> generate(const Llama& model, const Adapter* adapter,
                              const std::vector<int32_t>& prompt,
                              const std::vector<int32_t>& stop_ids, const SamplingOptions& options,
                              const std::function<bool(int32_t)>& token = {});

/// The token chosen from logits; `draw` in [0, 1).
int32_t sample(const std::vector<float>& logits, double temperature, double top_p, double draw);

}  // namespace qlab
