// Element types, their conversions, and the dispatch from a runtime dtype to a C++ type.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/error.h"

#if defined(__CUDACC__)
#define QLAB_HD __host__ __device__
#else
#define QLAB_HD
#endif
#define QLAB_INLINE __attribute__((always_inline))

namespace qlab {

enum class DType : uint8_t { f64, f32, bf16, f16, i64, i32, u8 };

/// Upper half of an IEEE binary32; conversion rounds to nearest even, NaN stays NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  QLAB_HD explicit bf16(float x) {
    const uint32_t u = to_bits(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u
               ? static_cast<uint16_t>((u >> 16) | 0x40u)
               : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  QLAB_HD explicit operator float() const { return from_bits(static_cast<uint32_t>(bits) << 16); }

  QLAB_HD static uint32_t to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
  QLAB_HD static float from_bits(uint32_t u) { return __builtin_bit_cast(float, u); }
};

/// The value of an IEEE binary16. Its fields, read as a float's, are off by the difference of the
/// exponent biases; infinities and NaNs keep the highest exponent.
QLAB_HD QLAB_INLINE inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const float value = magnitude < 0x7c00u ? bf16::from_bits(magnitude << 13) * 0x1p112f
                                          : bf16::from_bits(0x7f800000u | (magnitude << 13));
  return bf16::from_bits(bf16::to_bits(value) | sign);
}

/// IEEE binary16; conversion rounds to nearest even, from 65520 on to infinity, NaN stays NaN.
struct f16 {
  uint16_t bits = 0;
  f16() = default;
  QLAB_HD QLAB_INLINE explicit f16(float x) {
    const uint32_t u = bf16::to_bits(x), magnitude = u & 0x7fffffffu;
    uint32_t half = 0;
    if (magnitude >= 0x47800000u)  // 2^16
      half = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
    else if (magnitude < 0x38800000u)  // 2^-14; beside 1/2 a float's last place is 2^-24
      half = bf16::to_bits(bf16::from_bits(magnitude) + 0.5f) - 0x3f000000u;
    else
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    bits = static_cast<uint16_t>(half | (u >> 16 & 0x8000u));
  }
  QLAB_HD QLAB_INLINE explicit operator float() const { return half_to_float(bits); }
};

/// The types of 16 bits.
template <class T>
concept Half = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

size_t size_of(DType dtype);              // bytes per element
const char* name_of(DType dtype);         // "float32", "bfloat16", ... (PyTorch's names)
DType dtype_from_name(std::string_view);  // also fp32, bf16, ...; Error when unknown

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>)
    return DType::f64;
  else if constexpr (std::is_same_v<T, float>)
    return DType::f32;
  else if constexpr (std::is_same_v<T, bf16>)
    return DType::bf16;
  else if constexpr (std::is_same_v<T, f16>)
    return DType::f16;
  else if constexpr (std::is_same_v<T, int64_t>)
    return DType::i64;
  else if constexpr (std::is_same_v<T, int32_t>)
    return DType::i32;
  else
    return DType::u8;
}

template <class... Ts>
struct Types {};
/// The floating types each device computes in; f64 exists on the CPU only, as the reference.
using CpuFloats = Types<double, float, bf16, f16>;
using CudaFloats = Types<float, bf16, f16>;

/// Calls f.template operator()<T>() for the T in `Types` that matches `dtype`.
template <class... Ts, class F>
void dispatch(Types<Ts...>, DType dtype, const char* op, F&& f) {
  const bool found =
      ((dtype == dtype_of<Ts>() ? (f.template operator()<Ts>(), true) : false) || ...);
  QLAB_CHECK(found, "[{}] does not support {}", op, name_of(dtype));
}

/// The type in which sums over T are carried: f64 for f64, otherwise f32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace qlab
