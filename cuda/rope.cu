#include "core/ops/rope.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

// Rows are tokens, columns the heads * D / 2 pairs.
template <class T>
struct Rope {
  T* x;
  const int32_t* positions;
  const float* cosines;
  const float* sines;
  int64_t pitch;
  uint32_t half;
  float sign;  // -1 rotates back

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    const uint32_t head = static_cast<uint32_t>(col) / half;
    const uint32_t i = static_cast<uint32_t>(col) - head * half;
    const int64_t first = static_cast<int64_t>(head) * 2 * half + i;
    const int64_t angle = static_cast<int64_t>(positions[row]) * half + i;
    float a[width], b[width], c[width], s[width];
    load(a, x + row * pitch + first);
    load(b, x + row * pitch + first + half);
    load(c, cosines + angle);
    load(s, sines + angle);
    for (int j = 0; j < width; ++j) {
      const float sine = sign * s[j], u = a[j], v = b[j];
      a[j] = u * c[j] - v * sine;
      b[j] = v * c[j] + u * sine;
    }
    store(x + row * pitch + first, a);
    store(x + row * pitch + first + half, b);
  }
};

}  // namespace

void rope(const Tensor& x, const Tensor& positions, const Tensor& cos, const Tensor& sin,
          int64_t head_dim, bool inverse) {
  const int64_t half = head_dim / 2;
  // A row of x is aligned when its halves are: all of them start at multiples of D / 2.
  const bool vectors = vectorizable(half, x, cos, sin);
  dispatch(CudaFloats{}, x.dtype(), "rope", [&]<class T>() {
    elementwise(
        "rope",
        Rope<T>{x.data<T>(), positions.data<int32_t>(), cos.data<float>(), sin.data<float>(),
                x.pitch(), static_cast<uint32_t>(half), inverse ? -1.0f : 1.0f},
        x.rows(), x.cols() / 2, vectors);
  });
}

}  // namespace qlab::cuda
