#include "core/ops/gemm.h"

#include <Eigen/Core>
#include <algorithm>
#include <utility>

#include "core/cpu/gemm_kernel.h"
#include "core/gpu_limits.h"
#include "core/ops/copy.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

thread_local int64_t products_issued = 0;
thread_local int proposal = -1;

/// Of op(A) [m, k] and op(B) [k, n].
struct Sizes {
  int64_t m, n, k;
  double flop() const {
    return 2 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  }
  const char* name() const {
    return std::min({m, n, k}) < 256 ? "product with an adapter or few rows" : "product";
  }
};

Sizes checked_sizes(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b) {
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
  check_device("gemm", c, a);
  check_device("gemm", c, b);
  for (const Tensor* x : {&a, &b, &c}) check_gpu_matrix("gemm", *x);
  return {m, n, k};
}

Tensor workspace_of(const Sizes& z, DType dtype, Device device) {
  const int64_t bytes = device.target == DeviceType::cuda
                            ? cuda::gemm_workspace(z.m, z.n, z.k, dtype)
                            : cpu::gemm_workspace(z.m, z.n, z.k, dtype);
  const MemoryTag tag(Category::workspace);
  const MemoryName name("workspace of a product");
  return Tensor::empty({bytes}, DType::u8, device);
}

}  // namespace

int64_t gemm_count() { return products_issued; }

GemmProposal::GemmProposal(int number) : before_(std::exchange(proposal, number)) {}
GemmProposal::~GemmProposal() { proposal = before_; }
int GemmProposal::current() { return proposal; }

void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& addend, SplitK split_k) {
  const Sizes z = checked_sizes(c, a, op_a, b, op_b);
  const Tensor& d = addend.defined() ? addend : c;
  QLAB_CHECK(d.shape() == c.shape() && d.dtype() == c.dtype(), "[gemm] cannot add {} to {}",
             d.str(), c.str());
  ++products_issued;
  if (z.m == 0 || z.n == 0) return;
  const Device device = a.device();  // meta in a dry run, also when C is a gradient that exists
  const Tensor workspace = workspace_of(z, a.dtype(), device);
  const OpScope scope(z.name(), device,
                      {z.flop(), bytes_of_all(a, b, c) + (beta != 0 ? bytes_of_all(d) : 0)});
  on_device(
      device,
      [&] {
        if (addend.defined()) copy(c, addend);
        cpu::gemm(c, a, op_a, b, op_b, alpha, beta, workspace);
      },
      [&] { cuda::gemm(c, a, op_a, b, op_b, alpha, beta, d, split_k, workspace); });
}

void gemm_each(std::span<const Factors> products, Op op_a, Op op_b, SplitK split_k) {
  if (products.empty()) return;
  const Factors& first = products.front();
  const Device device = first.a.device();
  if (products.size() == 1 || device.target != DeviceType::cuda) {
    for (const Factors& p : products) gemm(p.c, p.a, op_a, p.b, op_b, 1.0f, 0.0f, {}, split_k);
    return;
  }
  double bytes = 0;
  for (const Factors& p : products) {
    checked_sizes(p.c, p.a, op_a, p.b, op_b);
    QLAB_CHECK(p.c.shape() == first.c.shape() && p.a.shape() == first.a.shape() &&
                   p.a.dtype() == first.a.dtype() && p.c.dtype() == first.c.dtype(),
               "[gemm_each] {} times {} into {} beside {} times {} into {}", p.a.str(), p.b.str(),
               p.c.str(), first.a.str(), first.b.str(), first.c.str());
    bytes += bytes_of_all(p.a, p.b, p.c);
  }
  const Sizes z = checked_sizes(first.c, first.a, op_a, first.b, op_b);
  products_issued += std::ssize(products);
  if (z.m == 0 || z.n == 0) return;
  const Tensor workspace = workspace_of(z, first.a.dtype(), device);
  const OpScope scope(z.name(), device, {z.flop() * static_cast<double>(products.size()), bytes});
  if (!device.is_meta()) cuda::gemm_each(products, op_a, op_b, split_k, workspace);
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
