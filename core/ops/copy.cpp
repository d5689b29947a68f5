#include "core/ops/copy.h"

#include <cstring>

#include "core/gpu_limits.h"
#include "core/parallel.h"

namespace qlab {

void copy(const Tensor& destination, const Tensor& source) {
  check_shape("copy", "source", source, destination.shape());
  if (destination.dtype() != source.dtype()) check_gpu_elements("cast", destination);
  if (source.numel() == 0 || destination.device().is_meta() || source.device().is_meta()) return;
  const bool same_device = destination.device() == source.device();
  if (destination.dtype() != source.dtype()) {
    QLAB_CHECK(same_device, "[copy] dtypes differ across devices: {} and {}", destination.str(),
               source.str());
    on_device(
        destination.device(), [&] { cpu::cast(destination, source); },
        [&] { cuda::cast(destination, source); });
    return;
  }
  const size_t size = size_of(source.dtype());
  const size_t row = source.cols() * size, rows = source.rows();
  const size_t to_pitch = destination.pitch() * size, from_pitch = source.pitch() * size;
  if (destination.device().is_cuda() || source.device().is_cuda()) {
    const bool whole = destination.contiguous() && source.contiguous();
    if (whole && source.device().is_cpu())
      cuda::upload(destination.raw(), source.raw(), row * rows);
    else if (whole)
      cuda::copy_async(destination.raw(), source.raw(), row * rows);
    else
      cuda::copy_rows(destination.raw(), to_pitch, source.raw(), from_pitch, row, rows);
    return;
  }
  for (size_t i = 0; i < rows; ++i)
    std::memcpy(static_cast<char*>(destination.raw()) + i * to_pitch,
                static_cast<const char*>(source.raw()) + i * from_pitch, row);
}

Tensor cast(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  Tensor y = Tensor::empty(x.shape(), dtype, x.device());
  copy(y, x);
  return y;
}

void fill_zero(const Tensor& x) {
  if (x.numel() == 0) return;
  const bool whole = x.contiguous();
  const size_t rows = whole ? 1 : x.rows(), bytes = x.bytes() / rows;
  const size_t pitch = whole ? bytes : x.pitch() * size_of(x.dtype());
  on_device(
      x.device(),
      [&] {
        for (size_t i = 0; i < rows; ++i)
          std::memset(static_cast<char*>(x.raw()) + i * pitch, 0, bytes);
      },
      [&] { cuda::fill_zero(x.raw(), pitch, bytes, rows); });
}

namespace cpu {

void cast(const Tensor& y, const Tensor& x) {
  dispatch(CpuFloats{}, x.dtype(), "cast", [&]<class From>() {
    dispatch(CpuFloats{}, y.dtype(), "cast", [&]<class To>() {
      const int64_t cols = x.cols();
      parallel_for(
          x.rows(), std::max<int64_t>(1, 65536 / std::max<int64_t>(cols, 1)),
          [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
              const From* from = x.data<From>() + i * x.pitch();
              To* to = y.data<To>() + i * y.pitch();
              using Wide =
                  std::conditional_t<std::is_same_v<From, double> && std::is_same_v<To, double>,
                                     double, float>;
              for (int64_t j = 0; j < cols; ++j)
                to[j] = static_cast<To>(static_cast<Wide>(from[j]));
            }
          });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
