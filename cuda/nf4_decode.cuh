// Decoding NF4 on the device, for kernels that differ in what they do with the values.
#pragma once
#include <bit>

#include "cuda/launch.cuh"
#include "quant/nf4.h"
#include "quant/quantize.h"

namespace qlab::cuda {

/// The scale of a block, stored plainly or in 8 bits.
struct Scales {
  const float* absmax = nullptr;   // plain
  const uint8_t* codes = nullptr;  // nested, with absmax2, map and offset
  const float* absmax2 = nullptr;
  const float* map = nullptr;
  const float* offset = nullptr;
  int shift = 0;  // log2 of the elements of a block
};
inline Scales scales_of(const Nf4Tensor& x) {
  Scales scales;
  scales.shift = std::countr_zero(static_cast<uint64_t>(x.block_size));
  if (x.double_quant) {
    scales.offset = x.offset.data<float>();
    scales.codes = x.absmax_code.data<uint8_t>();
    scales.absmax2 = x.absmax2.data<float>();
    scales.map = x.map.data<float>();
  } else {
    scales.absmax = x.absmax.data<float>();
  }
  return scales;
}

inline constexpr int map_size = 256;
inline constexpr int nested_shift = std::countr_zero(static_cast<uint64_t>(nested_block_size));

/// The scale of one block: fetched first, so that its loads stay in flight, then decoded.
template <bool nested>
struct Scale {
  float plain = 0, factor = 0;
  uint8_t code = 0;
  __device__ void fetch(const Scales& s, int64_t block) {
    if constexpr (nested) {
      code = s.codes[block];
      factor = s.absmax2[block >> nested_shift];
    } else {
      plain = s.absmax[block];
    }
  }
  __device__ float value(const float* map, float offset) const {
    return nested ? __fadd_rn(__fmul_rn(map[code], factor), offset) : plain;
  }
};

/// Entry number `index` % 16 of the table, by selects: indexed, it would be built in local memory.
__device__ inline float selected_value(uint32_t index) {
  float v = nf4::value(0);
#pragma unroll
  for (uint32_t i = 1; i < 16; ++i) v = index % 16 == i ? nf4::value(i) : v;
  return v;
}

/// Both values of a byte by one look-up: 256 pairs in shared memory, 16 copies side by side, of
/// which a lane reads its own, so that half a warp never meets in a bank. A pair's copies are
/// followed by 128 bytes that are free for others, so that an address is one byte permutation.
class PairTable {
 public:
  static constexpr int copies = 16;
  static constexpr int threads = 256;
  static constexpr int pitch = 2 * copies * 8;  // bytes
  static constexpr int bytes = 256 * pitch;

  /// By a block of `threads` threads, which then synchronize.
  __device__ static void fill(char* table) {
    const int low_code = static_cast<int>(threadIdx.x) / copies;
    const float low = selected_value(static_cast<uint32_t>(low_code));
    char* const to = table + low_code * pitch + threadIdx.x % copies * 8;
#pragma unroll
    for (int high = 0; high < 16; ++high)
      *reinterpret_cast<float2*>(to + high * 16 * pitch) = make_float2(nf4::value(high), low);
  }
  /// The dynamic map in free places: of entry `code`, in floats from the first of them.
  __device__ static int map_place(int code) { return code / 32 * (pitch / 4) + code % 32; }
  struct Map {
    const float* first;
    __device__ float operator()(int code) const { return first[map_place(code)]; }
  };
  __device__ explicit PairTable(const char* table)
      : table_(table), copy_(threadIdx.x % copies * 8) {}
  /// Of byte `i` of a word: the high nibble's value first.
  __device__ float2 operator()(uint32_t word, int i) const {
    const uint32_t at = __byte_perm(word, copy_, 0x5504 | i << 4);
    return *reinterpret_cast<const float2*>(table_ + at);
  }

 private:
  const char* table_;
  uint32_t copy_;
};

/// A scale where a kernel is told at run time how it is stored; entry(code) is that of the map.
struct AnyScale {
  Scale<true> scale;
  __device__ void fetch(const Scales& s, int64_t block) {
    if (s.codes != nullptr)
      scale.fetch(s, block);
    else
      scale.factor = s.absmax[block];
  }
  template <class Entry>
  __device__ float value(const Scales& s, const Entry& entry, float offset) const {
    if (s.codes == nullptr) return scale.factor;
    return __fadd_rn(__fmul_rn(entry(scale.code), scale.factor), offset);
  }
};

}  // namespace qlab::cuda
