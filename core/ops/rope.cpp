#include "core/ops/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/gpu_limits.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

double scaled_frequency(double frequency, const RopeScaling& s) {
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const double ratio = static_cast<double>(s.original_max_position_embeddings) / wavelength;
  if (ratio > s.high_freq_factor) return frequency;
  if (ratio < s.low_freq_factor) return frequency / s.factor;
  const double smooth = (ratio - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1.0 - smooth) * frequency / s.factor + smooth * frequency;
}

}  // namespace

RopeTables rope_tables(int64_t max_positions, int64_t head_dim, double theta,
                       const std::optional<RopeScaling>& scaling,
                       const std::vector<float>& divisors, Device device) {
  QLAB_CHECK(head_dim > 0 && head_dim % 2 == 0, "[rope_tables] head_dim must be even, got {}",
             head_dim);
  QLAB_CHECK(max_positions > 0 && theta > 0,
             "[rope_tables] max_positions and theta must be positive, got {} and {}", max_positions,
             theta);
  const int64_t half = head_dim / 2;
  QLAB_CHECK(divisors.empty() || static_cast<int64_t>(divisors.size()) == half,
             "[rope_tables] needs {} divisors for head_dim {}, got {}", half, head_dim,
             divisors.size());
  if (scaling)
    QLAB_CHECK(scaling->factor > 0 && scaling->high_freq_factor > scaling->low_freq_factor,
               "[rope_tables] scaling needs factor > 0 and high_freq_factor > low_freq_factor, got "
               "{}, {} and {}",
               scaling->factor, scaling->high_freq_factor, scaling->low_freq_factor);
  const Shape shape{max_positions, half};
  if (device.is_meta())
    return {Tensor::empty(shape, DType::f32, device), Tensor::empty(shape, DType::f32, device)};

  std::vector<float> cos(static_cast<size_t>(shape.numel())), sin(cos.size());
  for (int64_t i = 0; i < half; ++i) {
    double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / head_dim);
    if (!divisors.empty())
      frequency /= divisors[i];
    else if (scaling)
      frequency = scaled_frequency(frequency, *scaling);
    // Angles are rounded to fp32 as in Transformers, whose models were trained with them.
    const float rounded = static_cast<float>(frequency);
    for (int64_t p = 0; p < max_positions; ++p) {
      const double angle = static_cast<float>(p) * rounded;
      cos[p * half + i] = static_cast<float>(std::cos(angle));
      sin[p * half + i] = static_cast<float>(std::sin(angle));
    }
  }
  return {Tensor::from_vector(cos, shape, device), Tensor::from_vector(sin, shape, device)};
}

void rope_inplace(const Tensor& x, const Tensor& positions, const RopeTables& tables,
                  int64_t head_dim, bool inverse) {
  QLAB_CHECK(x.rank() == 2, "[rope] x must be [T, heads * D], got {}", x.str());
  QLAB_CHECK(head_dim > 0 && head_dim % 2 == 0 && x.dim(1) % head_dim == 0,
             "[rope] head_dim must be even and divide the {} columns of x, got {}", x.dim(1),
             head_dim);
  check_shape("rope", "positions", positions, {x.dim(0)});
  QLAB_CHECK(positions.dtype() == DType::i32, "[rope] positions must be int32, got {}",
             positions.str());
  QLAB_CHECK(tables.cos.rank() == 2 && tables.cos.dtype() == DType::f32,
             "[rope] cos must be float32 [positions, D / 2], got {}", tables.cos.str());
  check_shape("rope", "cos", tables.cos, {tables.cos.dim(0), head_dim / 2});
  check_shape("rope", "sin", tables.sin, tables.cos.shape());
  check_device("rope", x, positions);
  check_device("rope", x, tables.cos);
  check_gpu_matrix("rope", x);
  if (x.numel() == 0) return;
  const OpScope scope("rope", x.device(), {0, 2 * bytes_of_all(x)});
  on_device(
      x.device(), [&] { cpu::rope(x, positions, tables.cos, tables.sin, head_dim, inverse); },
      [&] { cuda::rope(x, positions, tables.cos, tables.sin, head_dim, inverse); });
}

namespace cpu {
namespace {

template <class T>
void rotate_head(T* x, const float* cos, const float* sin, int64_t half, float sign) {
  using A = accumulate_t<T>;
  for (int64_t i = 0; i < half; ++i) {
    const A c = cos[i], s = sign * sin[i];
    const A first = static_cast<A>(x[i]), second = static_cast<A>(x[i + half]);
    x[i] = static_cast<T>(first * c - second * s);
    x[i + half] = static_cast<T>(second * c + first * s);
  }
}

}  // namespace

void rope(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin,
          int64_t head_dim, bool inverse) {
  const int64_t cols = x.cols(), pitch = x.pitch(), half = head_dim / 2;
  const int32_t* position = positions.data<int32_t>();
  dispatch(CpuFloats{}, x.dtype(), "rope", [&]<class T>() {
    T* values = x.data<T>();
    parallel_for(x.rows(), std::max<int64_t>(1, 16384 / cols), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t p = position[t];
        QLAB_CHECK(p >= 0 && p < cos.dim(0), "[rope] positions must be in [0, {}), got {}",
                   cos.dim(0), p);
        for (int64_t h = 0; h < cols; h += head_dim)
          rotate_head(values + t * pitch + h, cos.data<float>() + p * half,
                      sin.data<float>() + p * half, half, inverse ? -1.0f : 1.0f);
      }
    });
  });
}

}  // namespace cpu
}  // namespace qlab
