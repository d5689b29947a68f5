// The body of a CPU gemm kernel, compiled once per instruction set: each including file first
// defines, in an anonymous namespace, Vec (width, load, store, zero, broadcast, fma), m_tile and
// n_vectors. Everything here has internal linkage, so no instruction leaks into another file.
#include <algorithm>
#include <cstring>

#include "core/cpu/gemm_kernel.h"

namespace qlab::cpu {
namespace {

constexpr int n_tile = n_vectors * Vec::width;

inline float widen(const float& x) { return x; }
inline float widen(const bf16& x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
inline float widen(const f16& x) { return half_to_float(x.bits); }

// Packs `tile` consecutive outer indices of a strided [outer, k] view as [k][tile].
template <int tile, class T>
void pack(const T* source, int64_t outer_stride, int64_t k_stride, int64_t outer, int64_t k,
          float* packed) {
  const int count = static_cast<int>(std::min<int64_t>(tile, outer));
  if (outer_stride == 1) {
    for (int64_t p = 0; p < k; ++p, packed += tile) {
      const T* from = source + p * k_stride;
      for (int j = 0; j < count; ++j) packed[j] = widen(from[j]);
      for (int j = count; j < tile; ++j) packed[j] = 0;
    }
    return;
  }
  // A transposition, in blocks of k that stay in the nearest cache.
  constexpr int64_t block = 16;
  for (int64_t p0 = 0; p0 < k; p0 += block) {
    const int64_t p1 = std::min(p0 + block, k);
    for (int j = 0; j < count; ++j) {
      const T* from = source + j * outer_stride;
      for (int64_t p = p0; p < p1; ++p) packed[p * tile + j] = widen(from[p * k_stride]);
    }
    for (int j = count; j < tile; ++j)
      for (int64_t p = p0; p < p1; ++p) packed[p * tile + j] = 0;
  }
}

template <int tile>
void pack_operand(const void* data, DType dtype, int64_t outer_stride, int64_t k_stride,
                  int64_t first, int64_t outer, int64_t k, float* packed) {
  const auto from = [&](const auto* source) {
    pack<tile>(source + first * outer_stride, outer_stride, k_stride, outer - first, k, packed);
  };
  if (dtype == DType::bf16)
    from(static_cast<const bf16*>(data));
  else if (dtype == DType::f16)
    from(static_cast<const f16*>(data));
  else
    from(static_cast<const float*>(data));
}

void pack_a(const GemmArgs& g, int64_t tile, float* packed) {
  pack_operand<m_tile>(g.a, g.in, g.a_row, g.a_col, tile * m_tile, g.m, g.k, packed);
}
void pack_b(const GemmArgs& g, int64_t tile, float* packed) {
  pack_operand<n_tile>(g.b, g.in, g.b_col, g.b_row, tile * n_tile, g.n, g.k, packed);
}

// Where a gradient goes back through the vocabulary K is 49k to 128k. In one chain of that length
// the gradients of SmolLM2 were 10 times as far from fp64 as PyTorch's.
constexpr int64_t k_block = 256;

template <int rows>
void accumulate(const float* a, const float* b, int64_t k, float* out) {
  Vec acc[rows][n_vectors];
  for (int64_t first = 0; first == 0 || first < k; first += k_block) {
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < n_vectors; ++v) acc[i][v] = Vec::zero();
    const int64_t last = std::min(first + k_block, k);
    for (int64_t p = first; p < last; ++p, a += m_tile, b += n_tile) {
      Vec bv[n_vectors];
      for (int v = 0; v < n_vectors; ++v) bv[v] = Vec::load(b + v * Vec::width);
      for (int i = 0; i < rows; ++i) {
        const Vec ai = Vec::broadcast(a[i]);
        for (int v = 0; v < n_vectors; ++v) acc[i][v] = Vec::fma(ai, bv[v], acc[i][v]);
      }
    }
    const Vec one = Vec::broadcast(1.0f);
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < n_vectors; ++v) {
        float* sum = out + i * n_tile + v * Vec::width;
        (first == 0 ? acc[i][v] : Vec::fma(acc[i][v], one, Vec::load(sum))).store(sum);
      }
  }
}

template <class T>
void write_tile(const GemmArgs& g, const float* sums, int64_t row, int64_t col, int64_t rows,
                int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    T* c = static_cast<T*>(g.c) + (row + i) * g.c_row + col;
    const float* s = sums + i * n_tile;
    if (g.beta == 0) {
      for (int64_t j = 0; j < cols; ++j) c[j] = static_cast<T>(g.alpha * s[j]);
    } else {
      for (int64_t j = 0; j < cols; ++j)
        c[j] = static_cast<T>(g.alpha * s[j] + g.beta * widen(c[j]));
    }
  }
}

template <int rows>
void accumulate_rows(int count, const float* a, const float* b, int64_t k, float* out) {
  if constexpr (rows == 1) {
    accumulate<1>(a, b, k, out);
  } else {
    if (count == rows)
      accumulate<rows>(a, b, k, out);
    else
      accumulate_rows<rows - 1>(count, a, b, k, out);
  }
}

void tile(const GemmArgs& g, int64_t i, int64_t j, const float* a, const float* b) {
  alignas(64) float sums[m_tile * n_tile];
  const int64_t row = i * m_tile, col = j * n_tile;
  const int64_t rows = std::min<int64_t>(m_tile, g.m - row);
  const int64_t cols = std::min<int64_t>(n_tile, g.n - col);
  accumulate_rows<m_tile>(static_cast<int>(rows), a, b, g.k, sums);
  if (g.out == DType::bf16)
    write_tile<bf16>(g, sums, row, col, rows, cols);
  else if (g.out == DType::f16)
    write_tile<f16>(g, sums, row, col, rows, cols);
  else
    write_tile<float>(g, sums, row, col, rows, cols);
}

}  // namespace
}  // namespace qlab::cpu
