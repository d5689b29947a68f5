// Sixteen elements at a time, for the CPU's inner loops. Element i of a sum always goes to lane
// i % 16 and the lanes are combined in one fixed order, and an elementwise rule is the same chain
// of IEEE operations in every lane, so bits do not depend on the instruction set, on alignment or
// on where a row ends. `vectorized` compiles the loop it is given for AVX-512, AVX2 and the
// baseline, and runs the widest that the processor has. Included by .cpp files only.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/dtype.h"

// The vectors below never cross a call that is not inlined, so their calling convention is moot.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace qlab::cpu {

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};

/// T is float or double; `width` is the size in bytes of the vector registers in use.
template <class T, int width>
struct Lanes {
  static constexpr int count = 16;
  static constexpr int vectors = count * static_cast<int>(sizeof(T)) / width;
  static constexpr int per_vector = count / vectors;
  using Vector = typename VectorOf<T, width>::type;
  using Half = typename VectorOf<uint16_t, per_vector * 2>::type;
  using Bits = typename VectorOf<uint32_t, per_vector * 4>::type;  // of a float vector

  Vector v[vectors];

  QLAB_INLINE static Lanes all(T x) {
    Vector value;
    for (int i = 0; i < per_vector; ++i) value[i] = x;
    Lanes r;
    for (int i = 0; i < vectors; ++i) r.v[i] = value;
    return r;
  }
  template <class S>
  QLAB_INLINE static Lanes load(const S* p) {
    Lanes r;
    for (int i = 0; i < vectors; ++i, p += per_vector) {
      if constexpr (std::is_same_v<S, T>) {
        std::memcpy(&r.v[i], p, sizeof(Vector));
      } else if constexpr (std::is_same_v<S, bf16>) {
        Half half;
        std::memcpy(&half, p, sizeof(Half));
        const Bits bits = __builtin_convertvector(half, Bits) << 16;
        std::memcpy(&r.v[i], &bits, sizeof(Vector));
      } else if constexpr (std::is_same_v<S, f16>) {
        for (int j = 0; j < per_vector; ++j) r.v[i][j] = static_cast<float>(p[j]);
      } else {
        typename VectorOf<S, per_vector * sizeof(S)>::type source;
        std::memcpy(&source, p, sizeof(source));
        r.v[i] = __builtin_convertvector(source, Vector);
      }
    }
    return r;
  }
  /// The first n elements; the other lanes hold `fill`.
  template <class S>
  QLAB_INLINE static Lanes load(const S* p, int64_t n, T fill = T{}) {
    if (n >= count) return load(p);
    T buffer[count];
    for (int i = 0; i < count; ++i) buffer[i] = i < n ? static_cast<T>(p[i]) : fill;
    return load(buffer);
  }
  template <class S>
  QLAB_INLINE void store(S* p) const {
    for (int i = 0; i < vectors; ++i, p += per_vector) {
      if constexpr (std::is_same_v<S, bf16>) {
        Bits u;
        std::memcpy(&u, &v[i], sizeof(Vector));
        const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const Bits quiet_nan = (u >> 16) | 0x40u;
        const Half half =
            __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, Half);
        std::memcpy(static_cast<void*>(p), &half, sizeof(Half));
      } else if constexpr (std::is_same_v<S, f16>) {
        for (int j = 0; j < per_vector; ++j) p[j] = static_cast<f16>(v[i][j]);
      } else {
        static_assert(std::is_same_v<S, T>);
        std::memcpy(p, &v[i], sizeof(Vector));
      }
    }
  }
  template <class S>
  QLAB_INLINE void store(S* p, int64_t n) const {
    if (n >= count) return store(p);
    S buffer[count];
    store(buffer);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }

  QLAB_INLINE friend Lanes operator+(const Lanes& a, const Lanes& b) {
    return zip(a, b, [](const Vector& x, const Vector& y) QLAB_INLINE { return x + y; });
  }
  QLAB_INLINE friend Lanes operator-(const Lanes& a, const Lanes& b) {
    return zip(a, b, [](const Vector& x, const Vector& y) QLAB_INLINE { return x - y; });
  }
  QLAB_INLINE friend Lanes operator*(const Lanes& a, const Lanes& b) {
    return zip(a, b, [](const Vector& x, const Vector& y) QLAB_INLINE { return x * y; });
  }
  QLAB_INLINE friend Lanes operator/(const Lanes& a, const Lanes& b) {
    return zip(a, b, [](const Vector& x, const Vector& y) QLAB_INLINE { return x / y; });
  }
  QLAB_INLINE friend Lanes operator*(const Lanes& a, T s) {
    return zip(a, a, [s](const Vector& x, const Vector&) QLAB_INLINE { return x * s; });
  }
  QLAB_INLINE friend Lanes operator-(const Lanes& a, T s) {
    return zip(a, a, [s](const Vector& x, const Vector&) QLAB_INLINE { return x - s; });
  }
  /// A NaN in `b` is passed over, one in `a` stays.
  QLAB_INLINE friend Lanes max(const Lanes& a, const Lanes& b) {
    return zip(a, b, [](const Vector& x, const Vector& y) QLAB_INLINE { return y > x ? y : x; });
  }
  QLAB_INLINE friend Lanes exp(const Lanes& a) {
    Lanes r;
    for (int i = 0; i < vectors; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        r.v[i] = exp_vector(a.v[i]);
      } else {
        for (int j = 0; j < per_vector; ++j) r.v[i][j] = std::exp(a.v[i][j]);
      }
    }
    return r;
  }

  QLAB_INLINE T sum() const {
    return fold([](T a, T b) QLAB_INLINE { return a + b; });
  }
  QLAB_INLINE T maximum() const {
    return fold([](T a, T b) QLAB_INLINE { return b > a ? b : a; });
  }

 private:
  template <class F>
  QLAB_INLINE static Lanes zip(const Lanes& a, const Lanes& b, const F& f) {
    Lanes r;
    for (int i = 0; i < vectors; ++i) r.v[i] = f(a.v[i], b.v[i]);
    return r;
  }
  template <class F>
  QLAB_INLINE T fold(const F& f) const {
    T lane[count];
    store(lane);
    for (int half = count / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
    return lane[0];
  }

  /// e^x = 2^n e^r with |r| <= log(2) / 2 and a polynomial of degree 7 (Cephes): within 2 ulp.
  /// Results below the normal range are zero. std::exp is a call per element, and Eigen's vectors
  /// leave the ends of a row to it, whose bits differ.
  QLAB_INLINE static Vector exp_vector(const Vector& x) {
    using Int = typename VectorOf<int32_t, width>::type;
    constexpr float low = -87.3365f, high = 88.7228f, magic = 12582912.0f;  // 1.5 * 2^23
    Vector c = x < low ? Vector{} + low : x;
    c = c > high ? Vector{} + high : c;
    const Vector shifted = c * 1.44269504088896341f + magic;
    const Vector n = shifted - magic;
    const Vector r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Int exponent;
    std::memcpy(&exponent, &shifted, sizeof(Int));
    exponent -= __builtin_bit_cast(int32_t, magic);
    const Int first = exponent >> 1, second = exponent - first;  // 2^128 needs two factors
    p = p * power_of_two(first) * power_of_two(second);
    p = x < low ? Vector{} : p;
    return x > high ? Vector{} + std::numeric_limits<float>::infinity() : p;
  }
  template <class Int>
  QLAB_INLINE static Vector power_of_two(const Int& n) {
    const Int bits = (n + 127) << 23;
    Vector v;
    std::memcpy(&v, &bits, sizeof(Vector));
    return v;
  }
};

#if defined(__x86_64__)
template <class F>
__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq"), noinline)) void run_avx512(
    const F& f) {
  f.template operator()<64>();
}
template <class F>
__attribute__((target("avx2"), noinline)) void run_avx2(const F& f) {
  f.template operator()<32>();
}
#endif

/// Calls f.template operator()<width>(), compiled for registers of that many bytes. The lambda and
/// what it calls must be QLAB_INLINE.
template <class F>
void vectorized(const F& f) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return run_avx512(f);
  if (__builtin_cpu_supports("avx2")) return run_avx2(f);
#endif
  f.template operator()<16>();
}

}  // namespace qlab::cpu
