// AdamW with 8-bit moments (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"),
// as bitsandbytes computes it. Of every tensor with at least 4,096 elements each block of 256, from
// the tensor's own start, keeps codes and one absmax per moment:
//   m = b1 signed_map[code] absmax + (1 - b1) g;  v = b2 unsigned_map[code] absmax + (1 - b2) g^2
//   p = p - lr (sqrt(c2) / c1) m / (sqrt(v) + eps sqrt(c2)), from m and v before they are coded;
//   p = p (1 - lr wd), after the update;  absmax = max |m| or |v| of the block
//   code = the map's entry nearest to m / absmax, moved one towards m's sign where signs differ
// Smaller tensors keep m and v in fp32, by the same formula. g is clipped, and a step whose norm is
// not finite is skipped, as in optim/adamw.h. One launch updates all adapters of all trials that
// train together.
#pragma once
#include <vector>

#include "optim/adamw.h"
#include "quant/quantize.h"

namespace qlab {

inline constexpr int64_t adamw8bit_block = 256, adamw8bit_min_size = 4096;

/// Blocks of the tensors that lie one after another in a flat buffer. Those of tensors in 8 bits
/// are numbered first; block b of them has its codes from 256 b on, a tensor's last block with room
/// to spare.
struct Blocks8 {
  int64_t coded = 0, plain = 0;  // how many blocks in 8 bits, and how many in 32
  std::vector<int64_t> table;    // of each tensor: first block, begin, end in the buffer
  static Blocks8 of(const std::vector<int64_t>& sizes);
};

/// What is updated: `blocks` whole, m and v those of coded blocks from number `first` on.
struct Moments8 {
  Tensor table;       // i64 [tensors, 3]: Blocks8::table
  Tensor maps;        // fp32 [2, 256]: signed, unsigned
  Tensor absmax;      // fp32 [2, coded]
  Tensor plain;       // fp32 [2, 256 plain]: m and v of the small tensors
  Tensor m, v;        // u8 [256 n], n coded blocks
  int64_t coded = 0;  // blocks in 8 bits, of the whole
};

/// Of blocks [first, last). param, grad: fp32 [n]; step: fp32 [8]; norm: fp32 [1].
struct AdamW8Update {
  Tensor param;
  Moments8 moments;
  int64_t first, last;
  Tensor grad, step, norm;
};
/// Of several trials on one device.
void adamw8bit(std::span<const AdamW8Update> trials);
/// Of one.
inline void adamw8bit(const Tensor& param, const Moments8& moments, int64_t first, int64_t last,
                      const Tensor& grad, const Tensor& step, const Tensor& norm) {
  const AdamW8Update one{param, moments, first, last, grad, step, norm};
  adamw8bit(std::span(&one, 1));
}

/// The tensor of a block: the last one that begins at or before it.
QLAB_HD inline int64_t tensor_of_block(const int64_t* table, int64_t tensors, int64_t block) {
  int64_t low = 0, high = tensors;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (table[3 * middle] <= block ? low : high) = middle;
  }
  return low;
}
/// One element, from moments in fp32.
QLAB_HD inline void adamw8bit_rule(float& p, float& m, float& v, float g, const AdamWStep& s,
                                   float clip) {
  g *= clip;
  m = s.beta1 * m + (1.0f - s.beta1) * g;
  v = s.beta2 * v + (1.0f - s.beta2) * g * g;
  const float rate = s.lr * (s.correction2_sqrt / s.correction1);
  p -= rate * (m / (__builtin_sqrtf(v) + s.eps * s.correction2_sqrt));
  p *= 1.0f - s.lr * s.weight_decay;
}
/// The code of m in a block whose largest magnitude is `absmax`. All zero, the block gets the code
/// of 1, which its absmax of 0 makes harmless.
QLAB_HD inline uint8_t signed_code(const float* map, float m, float absmax) {
  const uint8_t code = dynamic_code(map, m / absmax);
  if ((__builtin_signbit(map[code]) != 0) == (__builtin_signbit(m) != 0)) return code;
  return static_cast<uint8_t>(m > 0 ? code + 1 : code - 1);
}

namespace cpu {
void adamw8bit(std::span<const AdamW8Update> trials);
}
namespace cuda {
void adamw8bit(std::span<const AdamW8Update> trials);
}
}  // namespace qlab
