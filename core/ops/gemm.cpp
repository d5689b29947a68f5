#include "core/ops/gemm.h"

#include <Eigen/Core>
#include <algorithm>

#include "core/cpu/gemm_kernel.h"
#include "core/gpu_limits.h"
#include "core/ops/copy.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {
thread_local int64_t products = 0;
}

int64_t gemm_count() { return products; }

void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& addend, SplitK split_k) {
  QLAB_CHECK(a.rank() == 2 && b.rank() == 2 && c.rank() == 2,
             "[gemm] needs matrices, got {}, {} and {}", a.str(), b.str(), c.str());
  const int64_t m = a.dim(op_a == Op::none ? 0 : 1), k = a.dim(op_a == Op::none ? 1 : 0);
  const int64_t n = b.dim(op_b == Op::none ? 1 : 0);
  QLAB_CHECK(b.dim(op_b == Op::none ? 0 : 1) == k && c.dim(0) == m && c.dim(1) == n,
             "[gemm] shapes do not fit: op(A) [{}, {}], B {}, C {}", m, k, b.shape(), c.shape());
  QLAB_CHECK(a.dtype() == b.dtype() && (c.dtype() == a.dtype() || c.dtype() == DType::f32) &&
                 !(a.dtype() == DType::f64 && c.dtype() != DType::f64),
             "[gemm] dtypes {}, {} into {}", name_of(a.dtype()), name_of(b.dtype()),
             name_of(c.dtype()));
  const Tensor& d = addend.defined() ? addend : c;
  QLAB_CHECK(d.shape() == c.shape() && d.dtype() == c.dtype(), "[gemm] cannot add {} to {}",
             d.str(), c.str());
  check_device("gemm", c, a);
  check_device("gemm", c, b);
  for (const Tensor* x : {&a, &b, &c}) check_gpu_matrix("gemm", *x);
  ++products;
  if (m == 0 || n == 0) return;
  const Device device = a.device();  // meta in a dry run, also when C is a gradient that exists
  const int64_t bytes = device.target == DeviceType::cuda ? cuda::gemm_workspace(m, n, k, a.dtype())
                                                          : cpu::gemm_workspace(m, n, k, a.dtype());
  Tensor workspace;
  {
    const MemoryTag tag(Category::workspace);
    const MemoryName name("workspace of a product");
    workspace = Tensor::empty({bytes}, DType::u8, device);
  }
  const double dm = static_cast<double>(m), dn = static_cast<double>(n),
               dk = static_cast<double>(k);
  const bool skinny = std::min({m, n, k}) < 256;
  const OpScope scope(
      skinny ? "product with an adapter or few rows" : "product", device,
      {2 * dm * dn * dk, bytes_of_all(a, b, c) + (beta != 0 ? bytes_of_all(d) : 0)});
  on_device(
      device,
      [&] {
        if (addend.defined()) copy(c, addend);
        cpu::gemm(c, a, op_a, b, op_b, alpha, beta, workspace);
      },
      [&] { cuda::gemm(c, a, op_a, b, op_b, alpha, beta, d, split_k, workspace); });
}

Tensor matmul_nt(const Tensor& x, const Tensor& w) {
  Tensor y = Tensor::empty({x.dim(0), w.dim(0)}, x.dtype(), x.device());
  gemm(y, x, Op::none, w, Op::transpose);
  return y;
}

Tensor matmul_nn(const Tensor& dy, const Tensor& w) {
  Tensor dx = Tensor::empty({dy.dim(0), w.dim(1)}, dy.dtype(), dy.device());
  gemm(dx, dy, Op::none, w, Op::none);
  return dx;
}

namespace cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void gemm_f64(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, double alpha,
              double beta) {
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const auto map = [](const Tensor& t) {
    return Eigen::Map<Matrix, 0, Eigen::OuterStride<>>(t.data<double>(), t.dim(0), t.dim(1),
                                                       Eigen::OuterStride<>(t.pitch()));
  };
  const Matrix left = op_a == Op::none ? Matrix(map(a)) : Matrix(map(a).transpose());
  const Matrix right = op_b == Op::none ? Matrix(map(b)) : Matrix(map(b).transpose());
  Matrix product = alpha * (left * right);
  if (beta != 0) product += beta * map(c);
  map(c) = product;
}

}  // namespace

const GemmKernel& gemm_kernel() {
  static const GemmKernel& kernel = [&]() -> const GemmKernel& {
    if (const GemmKernel* k = gemm_kernel_avx512()) return *k;
    if (const GemmKernel* k = gemm_kernel_avx2()) return *k;
    return *gemm_kernel_generic();
  }();
  return kernel;
}

// All of op(A), packed once, and one panel of op(B) for each thread.
int64_t gemm_workspace(int64_t m, int64_t, int64_t k, DType dtype) {
  if (dtype == DType::f64) return 0;
  const GemmKernel& kernel = gemm_kernel();
  const int64_t rows = ceil_div(m, kernel.m_tile) * kernel.m_tile;
  return (rows + thread_count() * kernel.n_tile) * k * static_cast<int64_t>(sizeof(float));
}

void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& workspace) {
  if (a.dtype() == DType::f64) return gemm_f64(c, a, op_a, b, op_b, alpha, beta);
  const bool nt_a = op_a == Op::none, nt_b = op_b == Op::none;
  GemmArgs g{a.raw(),
             b.raw(),
             c.raw(),
             c.dim(0),
             c.dim(1),
             a.dim(nt_a ? 1 : 0),
             nt_a ? a.pitch() : 1,
             nt_a ? 1 : a.pitch(),
             nt_b ? b.pitch() : 1,
             nt_b ? 1 : b.pitch(),
             c.pitch(),
             a.dtype(),
             c.dtype(),
             alpha,
             beta};
  const GemmKernel& kernel = gemm_kernel();
  const int64_t m_tiles = ceil_div(g.m, kernel.m_tile), n_tiles = ceil_div(g.n, kernel.n_tile);
  float* packed_a = static_cast<float*>(workspace.raw());
  float* panels = packed_a + m_tiles * kernel.m_tile * g.k;
  parallel_for(m_tiles, 1 + 16384 / std::max<int64_t>(g.k * kernel.m_tile, 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   kernel.pack_a(g, i, packed_a + i * kernel.m_tile * g.k);
               });
  // Columns are shared out between the threads; a product with few columns shares out its rows.
  const int64_t threads =
      g.m * g.n * g.k < 65536
          ? 1
          : std::max<int64_t>(1, std::min<int64_t>(thread_count(), m_tiles * n_tiles));
  const bool by_columns = n_tiles >= threads;
  parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      float* panel = panels + part * kernel.n_tile * g.k;
      const int64_t j0 = by_columns ? n_tiles * part / threads : 0;
      const int64_t j1 = by_columns ? n_tiles * (part + 1) / threads : n_tiles;
      const int64_t i0 = by_columns ? 0 : m_tiles * part / threads;
      const int64_t i1 = by_columns ? m_tiles : m_tiles * (part + 1) / threads;
      for (int64_t j = j0; j < j1; ++j) {
        kernel.pack_b(g, j, panel);
        for (int64_t i = i0; i < i1; ++i)
          kernel.tile(g, i, j, packed_a + i * kernel.m_tile * g.k, panel);
      }
    }
  });
}

}  // namespace cpu

namespace cuda {

// Host code, so that a dry run for a GPU knows it in every build: what NVIDIA advises for cuBLASLt
// on Hopper.
int64_t gemm_workspace(int64_t, int64_t, int64_t, DType) { return int64_t{32} << 20; }

}  // namespace cuda
}  // namespace qlab
