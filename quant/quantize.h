// Blockwise quantization to NF4 with optional double quantization (Dettmers et al. 2023, section
// 3).
//
// Double quantization stores the scales themselves in 8 bits: with s the absmax of all blocks,
//   offset = mean(s),  d = s - offset,  blocks of 256 of d: absmax2 = max |d|,
//   code = nearest entry of the signed dynamic map to d / absmax2 (a tie goes to the even index),
//   scale = fp32(fp32(map[code] absmax2) + offset)     two roundings, as in bitsandbytes.
// The mean's sum is in double and in one order on both devices: see cpu::quantize_scales.
#pragma once
#include <array>

#include "core/tensor.h"

namespace qlab {

/// The signed 256-entry dynamic map: index 127 is 0, index 255 is +1, there is no -1.
const std::array<float, 256>& dynamic_map();
/// The one for values that are never negative: index 0 is 0, index 255 is 1.
const std::array<float, 256>& unsigned_dynamic_map();

/// A tensor of `shape` in NF4. n = shape.numel(), blocks = ceil(n / block_size).
struct Nf4Tensor {
  Shape shape;
  int64_t block_size = 64;
  bool double_quant = true;
  Tensor codes;        // u8 [(n + 1) / 2]
  Tensor absmax;       // fp32 [blocks]; undefined when double_quant
  Tensor absmax_code;  // u8 [blocks]
  Tensor absmax2;      // fp32 [ceil(blocks / 256)]
  Tensor offset;       // fp32 [1], behind absmax2
  Tensor map;          // fp32 [256], shared by all tensors of a device
};

inline constexpr int64_t nested_block_size = 256;
inline constexpr int64_t mean_lanes = 1024;  // of the sum behind the offset

/// x is f32, bf16, f16 (or f64 on the CPU), contiguous. block_size: a power of two, 32 to 4096.
/// The codes and scales are tagged weights and constants.
Nf4Tensor quantize_nf4(const Tensor& x, int64_t block_size, bool double_quant);
/// y [shape], row pitch honoured: value(code) * scale, one fp32 product rounded once to y's dtype.
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);

/// 1 / x and x as the GPU's instructions have them at the ends: subnormal operands and results are
/// zero.
QLAB_HD inline float flushed_reciprocal(float x) {
  constexpr float smallest = 0x1p-126f;
  if (x < smallest) return __builtin_inff();
  const float inverse = 1.0f / x;
  return inverse < smallest ? 0.0f : inverse;
}
QLAB_HD inline float flushed(float x) {
  constexpr float smallest = 0x1p-126f;
  return -smallest < x && x < smallest ? 0.0f : x;
}
/// Nearest entry of the map (ascending, 256 long); ties to the even index; NaN gives 0.
QLAB_HD inline uint8_t dynamic_code(const float* map, float x) {
  if (!(x >= map[0])) return 0;
  int lower = 0;
  for (int step = 128; step > 0; step /= 2)
    if (map[lower + step] <= x) lower += step;
  if (lower == 255) return 255;
  const float midpoint = (map[lower] + map[lower + 1]) * 0.5f;
  const int nearest = x < midpoint || (x == midpoint && lower % 2 == 0) ? lower : lower + 1;
  return static_cast<uint8_t>(nearest);
}

// quantize_nf4 fills codes and absmax, and sums[i] with the sum of the i-th 256 scales where `sums`
// (f64) is defined; quantize_scales fills absmax_code, absmax2 and offset from them.
namespace cpu {
void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& sums, const Tensor& x,
                  int64_t block_size);
void quantize_scales(const Nf4Tensor& out, const Tensor& absmax, const Tensor& sums);
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);
}  // namespace cpu
namespace cuda {
void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& sums, const Tensor& x,
                  int64_t block_size);
void quantize_scales(const Nf4Tensor& out, const Tensor& absmax, const Tensor& sums);
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);
}  // namespace cuda
}  // namespace qlab
