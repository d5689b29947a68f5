#include "core/ops/rope.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

constexpr uint32_t heads_per_thread = 2;

// Rows are tokens, columns the D / 2 pairs of every second head: one reading of the angles serves
// two heads. x is read and written once.
template <class T>
struct Rope {
  T* x;
  const int32_t* positions;
  const float* cosines;
  const float* sines;
  int64_t pitch;
  uint32_t half, heads;
  float sign;  // -1 rotates back

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    const uint32_t group = static_cast<uint32_t>(col) / half;
    const uint32_t i = static_cast<uint32_t>(col) - group * half;
    const int64_t angle = static_cast<int64_t>(positions[row]) * half + i;
    T* const first =
        x + row * pitch + static_cast<int64_t>(group) * heads_per_thread * 2 * half + i;
    const uint32_t count = min(heads_per_thread, heads - group * heads_per_thread);
    float c[width], s[width], a[heads_per_thread][width], b[heads_per_thread][width];
    load(c, cosines + angle);
    load(s, sines + angle);
#pragma unroll
    for (uint32_t h = 0; h < heads_per_thread; ++h)
      if (h < count) {
        load(a[h], first + 2 * h * half);
        load(b[h], first + (2 * h + 1) * half);
      }
#pragma unroll
    for (uint32_t h = 0; h < heads_per_thread; ++h)
      if (h < count) {
        for (int j = 0; j < width; ++j) {
          const float sine = sign * s[j], u = a[h][j], v = b[h][j];
          a[h][j] = u * c[j] - v * sine;
          b[h][j] = v * c[j] + u * sine;
        }
        store(first + 2 * h * half, a[h]);
        store(first + (2 * h + 1) * half, b[h]);
      }
  }
};

}  // namespace

void rope(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin,
          int64_t head_dim, bool inverse) {
  const int64_t half = head_dim / 2;
  // A row of x is aligned when its halves are: all of them start at multiples of D / 2.
  const bool vectors = vectorizable(half, x, cos, sin);
  const int64_t heads = x.cols() / head_dim, groups = ceil_div<int64_t>(heads, heads_per_thread);
  dispatch(CudaFloats{}, x.dtype(), "rope", [&]<class T>() {
    elementwise("rope",
                Rope<T>{x.data<T>(), positions.data<int32_t>(), cos.data<float>(),
                        sin.data<float>(), x.pitch(), static_cast<uint32_t>(half),
                        static_cast<uint32_t>(heads), inverse ? -1.0f : 1.0f},
                x.rows(), groups * half, vectors);
  });
}

}  // namespace qlab::cuda
