#include "core/ops/dropout.h"

#include <algorithm>

#include "core/parallel.h"

namespace qlab {
namespace {

void check_arguments(const char* op, const Tensor& x, const Tensor& example, const Tensor& position,
                     DropoutKey key) {
  QLAB_CHECK(x.rank() == 2 && x.contiguous(), "[{}] x must be [T, C] and contiguous, got {}", op,
             x.str());
  check_shape(op, "example", example, {x.dim(0)});
  check_shape(op, "position", position, {x.dim(0)});
  QLAB_CHECK(example.dtype() == DType::i64, "[{}] example must be int64, got {}", op,
             example.str());
  QLAB_CHECK(position.dtype() == DType::i32, "[{}] position must be int32, got {}", op,
             position.str());
  QLAB_CHECK(key.p >= 0 && key.p < 1, "[{}] p must be in [0, 1), got {}", op, key.p);
  check_device(op, x, example);
  check_device(op, x, position);
}

}  // namespace

Tensor dropout(const Tensor& x, const Tensor& example, const Tensor& position, DropoutKey key) {
  check_arguments("dropout", x, example, position, key);
  const Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  if (x.numel() == 0) return y;
  on_device(
      x.device(), [&] { cpu::dropout(y, x, example, position, key, false); },
      [&] { cuda::dropout(y, x, example, position, key, false); });
  return y;
}

void dropout_add(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
                 DropoutKey key) {
  check_arguments("dropout_add", x, example, position, key);
  check_shape("dropout_add", "y", y, x.shape());
  QLAB_CHECK(y.dtype() == x.dtype() && y.contiguous(),
             "[dropout_add] y must be {} and contiguous, got {}", name_of(x.dtype()), y.str());
  check_device("dropout_add", x, y);
  if (x.numel() == 0) return;
  on_device(
      x.device(), [&] { cpu::dropout(y, x, example, position, key, true); },
      [&] { cuda::dropout(y, x, example, position, key, true); });
}

namespace cpu {

void dropout(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
             DropoutKey key, bool accumulate) {
  const int64_t cols = x.cols();
  const int64_t* owner = example.data<int64_t>();
  const int32_t* place = position.data<int32_t>();
  const uint32_t threshold = dropout_threshold(key.p);
  dispatch(CpuFloats{}, x.dtype(), "dropout", [&]<class T>() {
    using A = accumulate_t<T>;
    T* out = y.data<T>();
    const T* in = x.data<T>();
    const A keep = A(1) - static_cast<A>(key.p);
    parallel_for(x.rows(), std::max<int64_t>(1, 4096 / cols), [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < cols; i += 4) {
          const uint64_t e = static_cast<uint64_t>(owner[t]);
          const Philox random =
              philox(key.key, static_cast<uint32_t>(i >> 2), static_cast<uint32_t>(place[t]),
                     static_cast<uint32_t>(e), static_cast<uint32_t>(e >> 32));
          for (int64_t j = i; j < std::min(i + 4, cols); ++j) {
            const int64_t at = t * cols + j;
            const A value = random.lane[j & 3] >= threshold ? static_cast<A>(in[at]) / keep : A(0);
            out[at] = static_cast<T>(accumulate ? static_cast<A>(out[at]) + value : value);
          }
        }
    });
  });
}

}  // namespace cpu
}  // namespace qlab
