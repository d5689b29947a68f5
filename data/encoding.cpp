#include "data/encoding.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace qlab {
namespace {

template <class T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

float load_half(const std::byte* p) { return half_to_float(load<uint16_t>(p)); }
int byte_at(const std::byte* p, int i) { return static_cast<int>(p[i]); }

/// In 32-element blocks byte j holds element j in its low nibble and element j + 16 in its high
/// one; bit j of `high` is the fifth bit of element j.
std::array<uint8_t, 32> quants_of(const std::byte* nibbles, uint32_t high = 0) {
  std::array<uint8_t, 32> q;
  for (size_t j = 0; j < 16; ++j) {
    q[j] = static_cast<uint8_t>(nibbles[j]) & 15;
    q[j + 16] = static_cast<uint8_t>(nibbles[j]) >> 4;
  }
  if (high != 0)
    for (size_t j = 0; j < 32; ++j) q[j] = static_cast<uint8_t>(q[j] | (high >> j & 1u) << 4);
  return q;
}

/// y = d (q - zero)
void scaled(float d, int zero, const std::array<uint8_t, 32>& q, float* y) {
  for (size_t j = 0; j < 32; ++j) y[j] = d * static_cast<float>(q[j] - zero);
}

/// y = d q + m
void affine(float d, float m, const std::array<uint8_t, 32>& q, float* y) {
  for (size_t j = 0; j < 32; ++j) y[j] = d * static_cast<float>(q[j]) + m;
}

void q4_0(const std::byte* p, float* y) { scaled(load_half(p), 8, quants_of(p + 2), y); }

void q4_1(const std::byte* p, float* y) {
  affine(load_half(p), load_half(p + 2), quants_of(p + 4), y);
}

void q5_0(const std::byte* p, float* y) {
  scaled(load_half(p), 16, quants_of(p + 6, load<uint32_t>(p + 2)), y);
}

void q5_1(const std::byte* p, float* y) {
  affine(load_half(p), load_half(p + 2), quants_of(p + 8, load<uint32_t>(p + 4)), y);
}

void q8_0(const std::byte* p, float* y) {
  const float d = load_half(p);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(load<int8_t>(p + 2 + j));
}

struct ScaleMin {
  int scale, min;
};

/// The six-bit scale and minimum of sub-block j, packed in 12 bytes.
ScaleMin scale_min(const std::byte* s, int j) {
  if (j < 4) return {byte_at(s, j) & 63, byte_at(s, j + 4) & 63};
  return {(byte_at(s, j + 4) & 15) | (byte_at(s, j - 4) >> 6) << 4,
          (byte_at(s, j + 4) >> 4) | (byte_at(s, j) >> 6) << 4};
}

/// Q4_K and Q5_K: eight sub-blocks of 32; 64 elements share 32 bytes, low nibbles first. Bit j of
/// the 32 bytes at `high` (null in Q4_K) is the fifth bit of sub-block j.
void k_block(const std::byte* p, const std::byte* high, const std::byte* low, float* y) {
  const float d = load_half(p), dmin = load_half(p + 2);
  for (int j = 0; j < 8; ++j) {
    const auto [sc, mn] = scale_min(p + 4, j);
    const float scale = d * static_cast<float>(sc), min = dmin * static_cast<float>(mn);
    for (int l = 0; l < 32; ++l) {
      const int byte = byte_at(low, 32 * (j / 2) + l);
      int q = j % 2 == 0 ? byte & 15 : byte >> 4;
      if (high != nullptr) q |= (byte_at(high, l) >> j & 1) << 4;
      y[32 * j + l] = scale * static_cast<float>(q) - min;
    }
  }
}

void q4_k(const std::byte* p, float* y) { k_block(p, nullptr, p + 16, y); }
void q5_k(const std::byte* p, float* y) { k_block(p, p + 16, p + 48, y); }

/// Two halves of 128; in each, quarter k of 32 elements takes nibbles from 64 low bytes, two bits
/// from 32 high bytes, and two scales.
void q6_k(const std::byte* p, float* y) {
  const float d = load_half(p + 208);
  for (int half = 0; half < 2; ++half) {
    const std::byte *low = p + 64 * half, *high = p + 128 + 32 * half, *scales = p + 192 + 8 * half;
    for (int e = 0; e < 128; ++e) {
      const int quarter = e / 32, l = e % 32;
      const int byte = byte_at(low, l + 32 * (quarter % 2));
      const int q = (quarter < 2 ? byte & 15 : byte >> 4) | (byte_at(high, l) >> 2 * quarter & 3)
                                                                << 4;
      const float scale = d * static_cast<float>(load<int8_t>(scales + e / 16));
      y[128 * half + e] = scale * static_cast<float>(q - 32);
    }
  }
}

using BlockDecoder = void (*)(const std::byte*, float*);

BlockDecoder block_decoder(Encoding encoding) {
  switch (encoding) {
    case Encoding::q4_0:
      return q4_0;
    case Encoding::q4_1:
      return q4_1;
    case Encoding::q5_0:
      return q5_0;
    case Encoding::q5_1:
      return q5_1;
    case Encoding::q8_0:
      return q8_0;
    case Encoding::q4_k:
      return q4_k;
    case Encoding::q5_k:
      return q5_k;
    case Encoding::q6_k:
      return q6_k;
    default:
      return nullptr;
  }
}

template <class Stored, class Value>
void decode_each(const std::byte* source, int64_t n, float* destination, Value&& value) {
  for (int64_t i = 0; i < n; ++i)
    destination[i] = value(load<Stored>(source + i * static_cast<int64_t>(sizeof(Stored))));
}

template <class T>
void convert(const float* source, int64_t n, void* destination) {
  std::byte* out = static_cast<std::byte*>(destination);
  for (int64_t i = 0; i < n; ++i) {
    const T value(source[i]);
    std::memcpy(out + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
  }
}

bool stored_as(Encoding encoding, DType dtype) {
  return (encoding == Encoding::f64 && dtype == DType::f64) ||
         (encoding == Encoding::f32 && dtype == DType::f32) ||
         (encoding == Encoding::bf16 && dtype == DType::bf16);
}

}  // namespace

EncodingInfo info_of(Encoding encoding) {
  static constexpr std::array<EncodingInfo, 12> table = {{{"F64", 1, 8},
                                                          {"F32", 1, 4},
                                                          {"F16", 1, 2},
                                                          {"BF16", 1, 2},
                                                          {"Q4_0", 32, 18},
                                                          {"Q4_1", 32, 20},
                                                          {"Q5_0", 32, 22},
                                                          {"Q5_1", 32, 24},
                                                          {"Q8_0", 32, 34},
                                                          {"Q4_K", 256, 144},
                                                          {"Q5_K", 256, 176},
                                                          {"Q6_K", 256, 210}}};
  return table[static_cast<size_t>(encoding)];
}

void decode_to_float(Encoding encoding, const std::byte* source, int64_t n, float* destination) {
  const auto [name, elems, bytes] = info_of(encoding);
  if (const BlockDecoder decode_block = block_decoder(encoding)) {
    for (int64_t i = 0; i < n; i += elems, source += bytes) decode_block(source, destination + i);
    return;
  }
  if (encoding == Encoding::f32)
    std::memcpy(destination, source, static_cast<size_t>(n) * sizeof(float));
  else if (encoding == Encoding::f64)
    decode_each<double>(source, n, destination, [](double x) { return static_cast<float>(x); });
  else if (encoding == Encoding::f16)
    decode_each<uint16_t>(source, n, destination, half_to_float);
  else
    decode_each<uint16_t>(source, n, destination, [](uint16_t bits) {
      return bf16::from_bits(static_cast<uint32_t>(bits) << 16);
    });
}

void decode(Encoding encoding, const std::byte* source, int64_t n, DType dtype, void* destination) {
  const auto [name, elems, bytes] = info_of(encoding);
  if (stored_as(encoding, dtype)) {
    std::memcpy(destination, source, static_cast<size_t>(n * bytes));
    return;
  }
  if (encoding == Encoding::f64 || dtype == DType::f32) {
    QLAB_CHECK(dtype == DType::f32, "{} numbers can be read as float64 or float32, not {}", name,
               name_of(dtype));
    return decode_to_float(encoding, source, n, static_cast<float*>(destination));
  }
  constexpr int64_t chunk = 1024;  // a whole number of blocks of every encoding
  std::array<float, chunk> values;
  for (int64_t i = 0; i < n; i += chunk) {
    const int64_t count = std::min(chunk, n - i);
    decode_to_float(encoding, source + i / elems * bytes, count, values.data());
    std::byte* out =
        static_cast<std::byte*>(destination) + i * static_cast<int64_t>(size_of(dtype));
    dispatch(CpuFloats{}, dtype, "decode",
             [&]<class T>() { convert<T>(values.data(), count, out); });
  }
}

}  // namespace qlab
