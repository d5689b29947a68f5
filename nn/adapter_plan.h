// How the GPU's kernels for adapters (nn/adapter_products.h) cut their sums into parts: by one
// segment's own rows and modules alone, so that its bits depend on nothing else. Scratch follows
// from it, so every build compiles it. T rows, K inputs, `width` columns of s and ds per module.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>

#include "nn/adapter_products.h"

namespace qlab::adapter_plan {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Numbers of blocks that keep an H100 busy, by measurement.

// ds and dB: tiles of columns of dy, splits of its rows.
inline constexpr int64_t out_tile_cols = 512;
inline int64_t out_tiles(std::span<const AdapterPart> parts) {
  int64_t tiles = 0;
  for (const AdapterPart& part : parts) tiles += ceil_div(part.out(), out_tile_cols);
  return tiles;
}
inline int64_t out_split_rows(int64_t t, int64_t tiles) {
  const int64_t splits = std::clamp<int64_t>(128 / tiles, 2, 16);
  return std::max<int64_t>(64, round_up(ceil_div(t, splits), 16));
}

// s with dropout: splits of the columns of x.
inline int64_t down_split_cols(int64_t t, int64_t k, int64_t parts) {
  const int64_t splits = ceil_div(256, ceil_div(t, 128) * parts);
  return std::max<int64_t>(256, round_up(ceil_div(k, splits), 64));
}

// dA with dropout: splits of the rows of x.
inline int64_t in_split_rows(int64_t t, int64_t k, int64_t parts) {
  const int64_t splits = std::clamp<int64_t>(384 / (ceil_div(k, 256) * parts), 2, 16);
  return std::max<int64_t>(128, round_up(ceil_div(t, splits), 32));
}

}  // namespace qlab::adapter_plan
