// Inverted dropout with a mask that is a function of its key: module, example, position, feature.
//   keep = bits(feature % 8) of philox(key, feature / 8, position, example) >= threshold
//   y = keep ? x / (1 - p') : 0,   threshold = round(p 2^16) = p' 2^16
// A draw of Philox4x32 with 7 rounds, which passes BigCrush (Salmon et al. 2011, table 2), decides
// eight features with 16 bits each; p' differs from p by at most 2^-17.
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

inline constexpr int dropout_rounds = 7;

/// What decides features 8 unit .. 8 unit + 7: two per lane, the first in the lower half.
QLAB_HD inline Philox dropout_bits(uint64_t key, int64_t example, int32_t position, uint32_t unit) {
  return philox<dropout_rounds>(key, unit, static_cast<uint32_t>(position),
                                static_cast<uint32_t>(example),
                                static_cast<uint32_t>(static_cast<uint64_t>(example) >> 32));
}
QLAB_HD inline uint32_t dropout_threshold(float p) {
  const double t = static_cast<double>(p) * 65536.0 + 0.5;
  return t >= 65535.0 ? 65535u : static_cast<uint32_t>(t);
}
/// 1 / (1 - p'): by this what is kept grows.
inline double dropout_factor(float p) {
  return 65536.0 / static_cast<double>(65536u - dropout_threshold(p));
}
QLAB_HD inline bool dropout_keeps(uint64_t key, int64_t example, int32_t position, int64_t feature,
                                  uint32_t threshold) {
  const Philox random = dropout_bits(key, example, position, static_cast<uint32_t>(feature >> 3));
  return (random.lane[feature >> 1 & 3] >> ((feature & 1) * 16) & 0xffff) >= threshold;
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
