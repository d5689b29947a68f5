// Inverted dropout with a mask that is a function of its key: module, example, position, feature.
//   keep = philox(key, feature / 4, position, example).lane[feature % 4] >= threshold
//   y = keep ? x / (1 - p) : 0,   threshold = round(p 2^32)
// The mask is never stored; the backward pass applies the same function to the gradient.
// Shapes: x, y [T, C]; example i64 [T] (running index of the example), position i32 [T].
#pragma once
#include "core/random.h"
#include "core/tensor.h"

namespace qlab {

struct DropoutKey {
  uint64_t key = 0;  // stream_key(dropout seed, module name)
  float p = 0;
};

QLAB_HD inline uint32_t dropout_threshold(float p) {
  const double t = static_cast<double>(p) * 4294967296.0 + 0.5;
  return t >= 4294967295.0 ? 0xffffffffu : static_cast<uint32_t>(t);
}
QLAB_HD inline bool dropout_keeps(uint64_t key, int64_t example, int32_t position, int64_t feature,
                                  uint32_t threshold) {
  const Philox random = philox(key, static_cast<uint32_t>(feature >> 2),
                               static_cast<uint32_t>(position), static_cast<uint32_t>(example),
                               static_cast<uint32_t>(static_cast<uint64_t>(example) >> 32));
  return random.lane[feature & 3] >= threshold;
}

Tensor dropout(const Tensor& x, const Tensor& example, const Tensor& position, DropoutKey key);
/// y += dropout(x): the masked gradient joins the one of the base path.
void dropout_add(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
                 DropoutKey key);

namespace cpu {
void dropout(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
             DropoutKey key, bool accumulate);
}
namespace cuda {
void dropout(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
             DropoutKey key, bool accumulate);
}
}  // namespace qlab
