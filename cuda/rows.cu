#include "core/ops/rows.h"

#include "cuda/elementwise.cuh"

namespace qlab::cuda {
namespace {

template <class Y, class X>
struct Gather {
  Y* y;
  const X* table;
  const int32_t* index;
  int64_t y_pitch, table_pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    const int64_t source = index[row];
    float v[width] = {};
    if (source >= 0) load(v, table + source * table_pitch + col);
    store(y + row * y_pitch + col, v);
  }
};

template <class T>
struct Scatter {
  T* y;
  const T* x;
  const int32_t* index;
  int64_t y_pitch, x_pitch;

  template <int width>
  __device__ void apply(int64_t row, int64_t col) const {
    const int64_t target = index[row];
    if (target < 0) return;
    float v[width];
    load(v, x + row * x_pitch + col);
    store(y + target * y_pitch + col, v);
  }
};

}  // namespace

void gather_rows(const Tensor& y, const Tensor& table, const Tensor& index) {
  const bool vectors = vectorizable(y.cols(), y, table);
  dispatch(CudaFloats{}, y.dtype(), "gather_rows", [&]<class Y>() {
    dispatch(CudaFloats{}, table.dtype(), "gather_rows", [&]<class X>() {
      elementwise("gather_rows",
                  Gather<Y, X>{y.data<Y>(), table.data<X>(), index.data<int32_t>(), y.pitch(),
                               table.pitch()},
                  y.rows(), y.cols(), vectors);
    });
  });
}

void scatter_rows(const Tensor& y, const Tensor& x, const Tensor& index) {
  dispatch(CudaFloats{}, y.dtype(), "scatter_rows", [&]<class T>() {
    elementwise("scatter_rows",
                Scatter<T>{y.data<T>(), x.data<T>(), index.data<int32_t>(), y.pitch(), x.pitch()},
                x.rows(), x.cols(), vectorizable(x.cols(), y, x));
  });
}

}  // namespace qlab::cuda
