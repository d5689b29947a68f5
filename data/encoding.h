// How numbers are stored in model files, and their conversion to a tensor's element type.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace qlab {

/// Element encodings that can be read: plain floats, and the block formats of GGUF.
enum class Encoding : uint8_t {
  f64,
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q4_k,
  q5_k,
  q6_k
};

struct EncodingInfo {
  const char* name;     // "BF16", "Q4_1"
  int64_t block_elems;  // elements per block
  int64_t block_bytes;
};
EncodingInfo info_of(Encoding encoding);

/// Decodes `n` elements (a whole number of blocks) to fp32, with every product and sum rounded, as
/// the reference decoder has it.
void decode_to_float(Encoding encoding, const std::byte* source, int64_t n, float* destination);

/// Decodes to f64, f32 or bf16. A plain copy where nothing changes.
void decode(Encoding encoding, const std::byte* source, int64_t n, DType dtype, void* destination);

}  // namespace qlab
