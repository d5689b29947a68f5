#include "core/ops/rows.h"

#include <algorithm>
#include <cstring>

#include "core/gpu_limits.h"
#include "core/ops/copy.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_index(const char* op, const Tensor& x, const Tensor& index) {
  QLAB_CHECK(x.rank() == 2 && x.contiguous(), "[{}] needs a contiguous matrix, got {}", op,
             x.str());
  QLAB_CHECK(index.rank() == 1 && index.dtype() == DType::i32,
             "[{}] index must be int32 [T], got {}", op, index.str());
  check_device(op, x, index);
  check_gpu_matrix(op, x);
}

}  // namespace

Tensor gather_rows(const Tensor& table, const Tensor& index, DType dtype) {
  check_index("gather_rows", table, index);
  const Tensor y = Tensor::empty({index.dim(0), table.dim(1)}, dtype, index.device());
  if (y.numel() == 0) return y;
  const OpScope scope("gather_rows", y.device(), {0, 2 * bytes_of_all(y)});
  on_device(
      y.device(), [&] { cpu::gather_rows(y, table, index); },
      [&] { cuda::gather_rows(y, table, index); });
  return y;
}

Tensor scatter_rows(const Tensor& x, const Tensor& index, int64_t rows) {
  check_index("scatter_rows", x, index);
  check_shape("scatter_rows", "index", index, {x.dim(0)});
  const Tensor y = Tensor::zeros({rows, x.dim(1)}, x.dtype(), x.device());
  if (x.numel() == 0 || rows == 0) return y;
  const OpScope scope("scatter_rows", x.device(), {0, 2 * bytes_of_all(x)});
  on_device(
      y.device(), [&] { cpu::scatter_rows(y, x, index); },
      [&] { cuda::scatter_rows(y, x, index); });
  return y;
}

namespace cpu {
namespace {

int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, 32768 / cols); }

}  // namespace

void gather_rows(const Tensor& y, const Tensor& table, const Tensor& index) {
  const int64_t cols = y.cols(), entries = table.dim(0);
  const int32_t* row = index.data<int32_t>();
  dispatch(CpuFloats{}, table.dtype(), "gather_rows", [&]<class From>() {
    dispatch(CpuFloats{}, y.dtype(), "gather_rows", [&]<class To>() {
      using Wide = std::conditional_t<std::is_same_v<From, double>, double, float>;
      To* out = y.data<To>();
      const From* in = table.data<From>();
      parallel_for(y.rows(), row_grain(cols), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          QLAB_CHECK(row[t] >= -1 && row[t] < entries,
                     "[gather_rows] index must be in [-1, {}), got {}", entries, row[t]);
          To* to = out + t * cols;
          if (row[t] < 0) {
            std::fill(to, to + cols, static_cast<To>(0.0f));
            continue;
          }
          const From* from = in + row[t] * cols;
          for (int64_t i = 0; i < cols; ++i) to[i] = static_cast<To>(static_cast<Wide>(from[i]));
        }
      });
    });
  });
}

void scatter_rows(const Tensor& y, const Tensor& x, const Tensor& index) {
  const int64_t rows = y.dim(0);
  const int32_t* row = index.data<int32_t>();
  const size_t bytes = static_cast<size_t>(x.cols()) * size_of(x.dtype());
  char* out = static_cast<char*>(y.raw());
  const char* in = static_cast<const char*>(x.raw());
  parallel_for(x.rows(), row_grain(x.cols()), [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      QLAB_CHECK(row[t] < rows, "[scatter_rows] index must be below {}, got {}", rows, row[t]);
      if (row[t] >= 0)
        std::memcpy(out + static_cast<size_t>(row[t]) * bytes, in + static_cast<size_t>(t) * bytes,
                    bytes);
    }
  });
}

}  // namespace cpu
}  // namespace qlab
