#include "quant/nf4_linear.h"

#include <algorithm>

#include "core/gpu_limits.h"
#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {

const char* name_of(Nf4Kernel kernel) {
  switch (kernel) {
    case Nf4Kernel::simt:
      return "simt";
    case Nf4Kernel::mma:
      return "mma";
    case Nf4Kernel::lut:
      return "lut";
    case Nf4Kernel::wgmma:
      return "wgmma";
    case Nf4Kernel::wgmma2:
      return "wgmma2";
    case Nf4Kernel::wgmma3:
      return "wgmma3";
  }
  return "?";
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string limits_of(Nf4Kernel kernel) {
  switch (kernel) {
    case Nf4Kernel::simt:
      return fmt::format("at most {} rows", cuda::nf4_simt_rows);
    case Nf4Kernel::mma:
      return fmt::format("at most {} rows and {} outputs, compute capability 8.0",
                         cuda::nf4_mma_rows, cuda::nf4_mma_outputs);
    case Nf4Kernel::lut:
      return fmt::format(
          "op transpose, at most {} rows, blocks of {} and more, compute capability 9.0",
          cuda::nf4_lut_rows, cuda::nf4_lut_columns);
    case Nf4Kernel::wgmma:
    case Nf4Kernel::wgmma2:
    case Nf4Kernel::wgmma3:
      return fmt::format(
          "outputs a multiple of {}, the contraction and blocks of {}, compute capability 9.0",
          cuda::nf4_wgmma_outputs, cuda::nf4_wgmma_depth);
  }
  return "";
}

}  // namespace

bool nf4_matmul_supported(Nf4Kernel kernel, const Nf4Tensor& w, Op op, int64_t rows, DType dtype,
                          Device device) {
  if (w.shape.rank() != 2) return false;
  if (device.target == DeviceType::cpu) return true;
  const int64_t n = w.shape[0], k = w.shape[1];
  // Rows of codes and of x and y start at 16 bytes, and 32 neighbours along K share a scale.
  if (dtype != DType::bf16 || n % 8 != 0 || k % 32 != 0 || n * k > INT32_MAX) return false;
  if (kernel == Nf4Kernel::simt) return rows <= cuda::nf4_simt_rows;
  if (kernel == Nf4Kernel::mma)
    return rows <= cuda::nf4_mma_rows && (op == Op::transpose ? n : k) <= cuda::nf4_mma_outputs &&
           compute_capability(device) >= 80;
  if (kernel == Nf4Kernel::lut)
    return op == Op::transpose && rows <= cuda::nf4_lut_rows && k % cuda::nf4_lut_columns == 0 &&
           w.block_size >= cuda::nf4_lut_columns && compute_capability(device) == 90;
  return (op == Op::transpose ? n : k) % cuda::nf4_wgmma_outputs == 0 &&
         (op == Op::transpose ? k : n) % cuda::nf4_wgmma_depth == 0 &&
         w.block_size >= cuda::nf4_wgmma_depth && compute_capability(device) == 90 &&
         (device.capability != 0 || cuda::nf4_wgmma_available());
}

void nf4_matmul(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, Nf4Kernel kernel,
                const Tensor& addend) {
  QLAB_CHECK(x.rank() == 2 && y.rank() == 2 && w.shape.rank() == 2,
             "[nf4_matmul] needs matrices, got x {}, y {} and W {}", x.str(), y.str(), w.shape);
  const int64_t m = x.dim(0), n = w.shape[0], k = w.shape[1];
  const int64_t in = op == Op::transpose ? k : n, out = op == Op::transpose ? n : k;
  QLAB_CHECK(x.dim(1) == in && y.dim(0) == m && y.dim(1) == out,
             "[nf4_matmul] shapes do not fit: y {}, x {}, W {}{}", y.shape(), x.shape(), w.shape,
             op == Op::transpose ? "^T" : "");
  QLAB_CHECK(x.dtype() == y.dtype(), "[nf4_matmul] dtypes {} into {}", name_of(x.dtype()),
             name_of(y.dtype()));
  QLAB_CHECK(!addend.defined() || (addend.shape() == y.shape() && addend.dtype() == y.dtype()),
             "[nf4_matmul] cannot add {} to {}", addend.str(), y.str());
  check_device("nf4_matmul", y, x);
  check_device("nf4_matmul", x, w.codes);
  if (m == 0 || out == 0) return;
  const Device device = x.device();
  QLAB_CHECK(nf4_matmul_supported(kernel, w, op, m, x.dtype(), device),
             "[nf4_matmul] no {} kernel for {} rows of {} with W {} on {}: it takes bfloat16, N a "
             "multiple of 8, K of {}, {}",
             name_of(kernel), m, name_of(x.dtype()), w.shape, device.str(),
             kernel == Nf4Kernel::lut ? cuda::nf4_lut_columns : 32, limits_of(kernel));
  for (const Tensor* t : {&x, &y, &w.codes, &addend})
    if (t->defined()) check_gpu_rows("nf4_matmul", *t);
  Tensor weight, workspace;
  {
    const MemoryTag tag(Category::workspace);
    const MemoryName name("workspace of a product");
    if (device.target == DeviceType::cpu) {
      weight = Tensor::empty(w.shape, x.dtype(), device);
      workspace = Tensor::empty({cpu::gemm_workspace(m, out, in, x.dtype())}, DType::u8, device);
    } else if (const int64_t rows = cuda::nf4_workspace_rows(kernel, op, n, k, m); rows > 0) {
      workspace = Tensor::empty({rows, out}, DType::f32, device);
    }
  }
  const OpScope scope(
      "nf4_matmul", device,
      {2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k),
       bytes_of_all(x, y, addend, w.codes, w.absmax, w.absmax_code, w.absmax2)});
  on_device(
      device,
      [&] {
        if (addend.defined() && addend.raw() != y.raw()) copy(y, addend);
        cpu::nf4_matmul(y, x, w, op, addend.defined() ? 1.0f : 0.0f, weight, workspace);
      },
      [&] {
        switch (kernel) {
          case Nf4Kernel::simt:
            return cuda::nf4_matmul_simt(y, x, w, op, addend, workspace);
          case Nf4Kernel::mma:
            return cuda::nf4_matmul_mma(y, x, w, op, addend, workspace);
          case Nf4Kernel::lut:
            return cuda::nf4_matmul_lut(y, x, w, addend);
          case Nf4Kernel::wgmma:
            return cuda::nf4_matmul_wgmma(y, x, w, op, 1, addend, workspace);
          case Nf4Kernel::wgmma2:
            return cuda::nf4_matmul_wgmma(y, x, w, op, 2, addend, workspace);
          case Nf4Kernel::wgmma3:
            return cuda::nf4_matmul_wgmma(y, x, w, op, 3, addend, workspace);
        }
      });
}

namespace cpu {

void nf4_matmul(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, float beta,
                const Tensor& weight, const Tensor& workspace) {
  cpu::dequantize_nf4(weight, w);
  cpu::gemm(y, x, Op::none, weight, op, 1.0f, beta, workspace);
}

}  // namespace cpu
namespace cuda {

// Two blocks to a multiprocessor of a large GPU, and no part so short that its beginning and end
// cost more than it saves.
int64_t nf4_splits(Nf4Kernel kernel, Op op, int64_t n, int64_t k) {
  const bool cuts = kernel == Nf4Kernel::mma || (kernel == Nf4Kernel::simt && op == Op::none);
  if (!cuts) return 1;
  constexpr int64_t blocks = 256;
  const int64_t tile = kernel == Nf4Kernel::simt ? 512 : 128;  // outputs of a block
  const int64_t step = kernel == Nf4Kernel::simt ? 16 : 128;   // of the contraction
  const int64_t shortest = 4;                                  // steps
  const int64_t tiles = ceil_div(op == Op::transpose ? n : k, tile);
  const int64_t steps = ceil_div(op == Op::transpose ? k : n, step);
  const int64_t most = kernel == Nf4Kernel::simt ? blocks : 8;
  const int64_t wanted =
      std::clamp<int64_t>(blocks / tiles, 1, std::min(most, ceil_div(steps, shortest)));
  return ceil_div(steps, ceil_div(steps, wanted));
}

int64_t nf4_workspace_rows(Nf4Kernel kernel, Op op, int64_t n, int64_t k, int64_t m) {
  if (kernel == Nf4Kernel::wgmma2) {
    for (const int64_t tile : nf4_wgmma_tiles)
      if (m <= tile) return tile;
    return 0;
  }
  const int64_t parts = nf4_splits(kernel, op, n, k);
  return parts > 1 ? parts * m : 0;
}

}  // namespace cuda
}  // namespace qlab
