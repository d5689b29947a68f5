#include "quant/nf4_linear.h"

#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {

const char* name_of(Nf4Kernel kernel) {
  switch (kernel) {
    case Nf4Kernel::simt:
      return "simt";
    case Nf4Kernel::mma:
      return "mma";
    case Nf4Kernel::wgmma:
      return "wgmma";
  }
  return "?";
}

bool nf4_matmul_supported(Nf4Kernel, const Nf4Tensor& w, Op, int64_t, DType, Device device) {
  return w.shape.rank() == 2 && device.target == DeviceType::cpu;
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
             "[nf4_matmul] no {} kernel for {} rows of {} with W {} on {}", name_of(kernel), m,
             name_of(x.dtype()), w.shape, device.str());
  Tensor weight, workspace;
  {
    const MemoryTag tag(Category::workspace);
    const MemoryName name("workspace of a product");
    weight = Tensor::empty(w.shape, x.dtype(), device);
    workspace = Tensor::empty({cpu::gemm_workspace(m, out, in, x.dtype())}, DType::u8, device);
  }
  const OpScope scope(
      "nf4_matmul", device,
      {2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k),
       bytes_of_all(x, y, addend, w.codes, w.absmax, w.absmax_code, w.absmax2)});
  if (addend.defined() && addend.raw() != y.raw()) copy(y, addend);
  on_device(
      device,
      [&] { cpu::nf4_matmul(y, x, w, op, addend.defined() ? 1.0f : 0.0f, weight, workspace); },
      [] {});
}

namespace cpu {

void nf4_matmul(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, float beta,
                const Tensor& weight, const Tensor& workspace) {
  cpu::dequantize_nf4(weight, w);
  cpu::gemm(y, x, Op::none, weight, op, 1.0f, beta, workspace);
}

}  // namespace cpu
}  // namespace qlab
