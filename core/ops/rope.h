// Rotary position embedding (Su et al. 2021, eq. 34), in the half-split layout of Hugging Face's
// Llama: with h = D / 2, element i of a head pairs with element i + h,
//   y_i = x_i cos - x_{i+h} sin        y_{i+h} = x_{i+h} cos + x_i sin
// where cos, sin = tables[position, i]. The backward pass rotates by the negative angle.
// Shapes: x [T, heads * D], rows may lie apart; positions i32 [T]; cos, sin [max_positions, D / 2]
// fp32. y takes the place of x, which may be some columns of a merged projection.
#pragma once
#include <optional>

#include "core/tensor.h"

namespace qlab {

/// The llama3 rule: wavelengths above original/low are divided by factor, those below original/high
/// kept, between them interpolated.
struct RopeScaling {
  float factor = 8, low_freq_factor = 1, high_freq_factor = 4;
  int64_t original_max_position_embeddings = 8192;
};

struct RopeTables {
  Tensor cos, sin;
};
/// `divisors` (from a GGUF file's rope_freqs.weight, D / 2 values) replace `scaling` when not
/// empty.
RopeTables rope_tables(int64_t max_positions, int64_t head_dim, double theta,
                       const std::optional<RopeScaling>& scaling,
                       const std::vector<float>& divisors, Device device);

void rope_inplace(const Tensor& x, const Tensor& positions, const RopeTables& tables,
                  int64_t head_dim, bool inverse = false);

namespace cpu {
void rope(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin,
          int64_t head_dim, bool inverse);
}
namespace cuda {
void rope(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin,
          int64_t head_dim, bool inverse);
}
}  // namespace qlab
