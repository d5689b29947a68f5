// Blockwise quantization to NF4 with optional double quantization (Dettmers et al. 2023, section
// 3).
//
// Double quantization stores the scales themselves in 8 bits: with s the absmax of all blocks,
//   offset = mean(s),  d = s - offset,  blocks of 256 of d: absmax2 = max |d|,
//   code = nearest entry of the signed dynamic map to d / absmax2 (a tie goes to the even index),
//   scale = fp32(fp32(map[code] absmax2) + offset)     two roundings, as in bitsandbytes.
#pragma once
#include <array>

#include "core/tensor.h"

namespace qlab {

/// The signed 256-entry dynamic map: index 127 is 0, index 255 is +1, there is no -1.
const std::array<float, 256>& dynamic_map();

/// A tensor of `shape` in NF4. n = shape.numel(), blocks = ceil(n / block_size).
struct Nf4Tensor {
  Shape shape;
  int64_t block_size = 64;
  bool double_quant = true;
  Tensor codes;        // u8 [(n + 1) / 2]
  Tensor absmax;       // fp32 [blocks]; undefined when double_quant
  Tensor absmax_code;  // u8 [blocks]
  Tensor absmax2;      // fp32 [ceil(blocks / 256)]
  Tensor map;          // fp32 [256], shared by all tensors of a device
  float offset = 0;
};

inline constexpr int64_t nested_block_size = 256;

/// x is f32, bf16 (or f64 on the CPU), contiguous. block_size: a power of two, 32 to 4096.
/// The codes and scales are tagged weights and constants.
Nf4Tensor quantize_nf4(const Tensor& x, int64_t block_size, bool double_quant);
/// y [shape], row pitch honoured: value(code) * scale, one fp32 product rounded once to y's dtype.
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);

/// The scales' own quantizer, host and exact: codes and absmax2 of d. Used by both devices.
void quantize_scales(const float* absmax, int64_t blocks, uint8_t* codes, float* absmax2,
                     float& offset);
/// Nearest map entry; ties to the even index; NaN gives 0.
uint8_t dynamic_code(float x);

namespace cpu {
void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& x, int64_t block_size);
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);
}  // namespace cpu
namespace cuda {
void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& x, int64_t block_size);
void dequantize_nf4(const Tensor& y, const Nf4Tensor& x);
}  // namespace cuda
}  // namespace qlab
