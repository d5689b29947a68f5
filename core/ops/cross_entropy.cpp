#include "core/ops/cross_entropy.h"

#include "core/gpu_limits.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {

void cross_entropy_inplace(const Tensor& nll, const Tensor& z, const Tensor& labels,
                           const Tensor& scale) {
  QLAB_CHECK(z.rank() == 2 && z.dim(1) > 0, "[cross_entropy] z must be [T, V], got {}", z.str());
  check_shape("cross_entropy", "labels", labels, {z.dim(0)});
  check_shape("cross_entropy", "nll", nll, {z.dim(0)});
  QLAB_CHECK(labels.dtype() == DType::i32, "[cross_entropy] labels must be int32, got {}",
             labels.str());
  const DType statistic = z.dtype() == DType::f64 ? DType::f64 : DType::f32;
  QLAB_CHECK(nll.dtype() == statistic, "[cross_entropy] nll must be {}, got {}", name_of(statistic),
             nll.str());
  check_device("cross_entropy", z, labels);
  check_device("cross_entropy", z, nll);
  check_gpu_matrix("cross_entropy", z);
  if (scale.defined()) {
    check_shape("cross_entropy", "scale", scale, {z.dim(0)});
    QLAB_CHECK(scale.dtype() == DType::f32, "[cross_entropy] scale must be float32, got {}",
               scale.str());
    check_device("cross_entropy", z, scale);
  }
  if (z.dim(0) == 0) return;
  const OpScope scope("cross_entropy", z.device(),
                      {0, bytes_of_all(z) * (scale.defined() ? 3 : 1)});
  on_device(
      z.device(), [&] { cpu::cross_entropy(nll, z, labels, scale); },
      [&] { cuda::cross_entropy(nll, z, labels, scale); });
}

namespace cpu {
namespace {

template <class A>
struct Statistics {
  A maximum, sum;  // of z, and of exp(z - maximum)
};

template <int width, class T>
QLAB_INLINE inline Statistics<accumulate_t<T>> row_statistics(const T* z, int64_t cols) {
  using A = accumulate_t<T>;
  using L = Lanes<A, width>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  L highest = L::all(lowest), sum = L::all(0);
  for (int64_t i = 0; i < cols; i += 16) highest = max(highest, L::load(z + i, cols - i, lowest));
  const A maximum = highest.maximum();
  // In blocks: the many small terms of a vocabulary would be lost one by one beside the largest.
  constexpr int64_t block = 1024;
  for (int64_t first = 0; first < cols; first += block) {
    const int64_t last = std::min(first + block, cols);
    L part = L::all(0);
    for (int64_t i = first; i < last; i += 16)
      part = part + exp(L::load(z + i, last - i, lowest) - maximum);
    sum = sum + part;
  }
  return {maximum, sum.sum()};
}

template <int width, class T>
QLAB_INLINE inline void row_gradient(T* z, Statistics<accumulate_t<T>> s, int64_t cols,
                                     int32_t label, float scale) {
  using A = accumulate_t<T>;
  using L = Lanes<A, width>;
  // The label's p - 1 is formed from its own logit before the row is overwritten.
  const L one_logit = L::all(static_cast<A>(z[label]));
  A at_label[16];
  ((exp(one_logit - s.maximum) * (A(1) / s.sum) - A(1)) * static_cast<A>(scale)).store(at_label);
  const A factor = A(1) / s.sum;
  for (int64_t i = 0; i < cols; i += 16)
    (exp(L::load(z + i, cols - i) - s.maximum) * factor * static_cast<A>(scale))
        .store(z + i, cols - i);
  z[label] = static_cast<T>(at_label[0]);
}

}  // namespace

void cross_entropy(const Tensor& nll, const Tensor& z, const Tensor& labels, const Tensor& scale) {
  const int64_t cols = z.cols(), pitch = z.pitch();
  const int32_t* label = labels.data<int32_t>();
  const float* factor = scale.defined() ? scale.data<float>() : nullptr;
  dispatch(CpuFloats{}, z.dtype(), "cross_entropy", [&]<class T>() {
    using A = accumulate_t<T>;
    T* logits = z.data<T>();
    A* loss = nll.data<A>();
    parallel_for(z.rows(), std::max<int64_t>(1, 8192 / cols), [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        QLAB_CHECK(label[t] == ignore_label || (label[t] >= 0 && label[t] < cols),
                   "[cross_entropy] labels must be {} or in [0, {}), got {}", ignore_label, cols,
                   label[t]);
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t) {
          T* row = logits + t * pitch;
          if (label[t] == ignore_label) {
            loss[t] = 0;
            if (factor != nullptr) std::fill(row, row + cols, static_cast<T>(0.0f));
            continue;
          }
          const auto s = row_statistics<width>(row, cols);
          loss[t] = std::log(s.sum) - (static_cast<A>(row[label[t]]) - s.maximum);
          if (factor != nullptr) row_gradient<width>(row, s, cols, label[t], factor[t]);
        }
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
