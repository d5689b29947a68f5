// What cuBLAS proposes for a training step's products with frozen weights, timed in turns with its
// own choice: the linear layers as a step multiplies them, q, k, v and gate, up as one, 16 columns
// of an adapter beside each matrix. `make tune` takes a proposal where it is the fastest; one whose
// sums differ from those of the library's choice in a bit is left out. FLOP: 2 M N K.
#include <array>
#include <memory>

#include "bench/support.h"
#include "core/ops/copy.h"
#include "core/ops/gemm_tiling.h"

namespace qlab::bench {
namespace {

/// x W^T or, with Op::none, dy W; W [n, k] and m rows.
struct ProductShape {
  int64_t n, k, m;
  Op op;
  auto operator<=>(const ProductShape&) const = default;

  int64_t in() const { return (op == Op::transpose ? k : n) + adapter; }
  int64_t out() const { return op == Op::transpose ? n : k; }

  static constexpr int64_t adapter = 16;
};

/// C = A op(B), with room behind the rows of all that an adapter can lie beside, as in a step.
struct Product {
  ProductShape shape;
  Tensor c, a;
  std::vector<Tensor> b;  // of copies that exceed the caches

  Product(const ProductShape& s, Device device) : shape(s) {
    const bool forward = s.op == Op::transpose;
    const auto matrix = [&](int64_t rows, int64_t cols, int64_t tail, float scale) {
      const Shape block{rows, (cols + tail + 63) / 64 * 64};
      const Tensor whole = device.is_meta() ? Tensor::empty(block, DType::bf16, device)
                                            : random(block, DType::bf16, device, scale);
      return whole.slice_cols(0, cols);
    };
    a = matrix(s.m, s.in(), 48, 1.0f);
    c = matrix(s.m, s.out(), forward ? 64 : 0, 1.0f);
    const int64_t rows = forward ? s.n : s.in(), cols = forward ? s.in() : s.k;
    const int count = device.is_meta() ? 1 : copies(device, 2.0 * static_cast<double>(rows * cols));
    while (static_cast<int>(b.size()) < count) b.push_back(matrix(rows, cols, 48, 0.02f));
  }

  void multiply(int proposal, int i) const {
    const GemmProposal chosen(proposal);
    gemm(c, a, Op::none, b[static_cast<size_t>(i) % b.size()], shape.op);
  }

  /// The first and the last 256 rows of C, byte by byte.
  std::vector<std::byte> some_rows() const {
    std::vector<std::byte> bytes;
    for (const int64_t begin : {int64_t{0}, std::max<int64_t>(0, shape.m - 256)}) {
      const Tensor rows = c.slice_rows(begin, std::min(begin + 256, shape.m)).to(Device::cpu());
      synchronize(c.device());
      const auto* from = static_cast<const std::byte*>(rows.raw());
      bytes.insert(bytes.end(), from, from + rows.bytes());
    }
    return bytes;
  }
};

/// The product in use; another takes its place.
std::shared_ptr<const Product> product_of(const ProductShape& shape, Device device) {
  static std::shared_ptr<const Product> current;
  if (!current || current->shape != shape) {
    current.reset();
    current = std::make_shared<const Product>(shape, device);
  }
  return current;
}

Case timed(const std::shared_ptr<const Product>& product, int proposal) {
  const ProductShape& s = product->shape;
  const Device device = product->c.device();
  return {.device = device,
          .dry = [=, dry = std::make_shared<const Product>(
                         s, device.meta())] { dry->multiply(proposal, 0); },
          .call =
              [=](int i) {
                product->multiply(proposal, i);
                return std::vector{product->c};
              },
          .inputs = static_cast<int>(product->b.size()),
          .flops = 2.0 * static_cast<double>(s.m) * static_cast<double>(s.in()) *
                   static_cast<double>(s.out()),
          .sample_seconds = 20e-3};
}

Case make_case(const ProductShape& shape, int proposal, Device device) {
  const Product dry(shape, device.meta());
  const std::vector<GemmTiling> tilings = cuda::gemm_proposals(
      dry.c, dry.a, dry.b[0], shape.op,
      Tensor::empty({cuda::gemm_workspace(shape.m, shape.out(), shape.in(), dry.a.dtype())},
                    DType::u8, device.meta()));
  if (proposal >= std::ssize(tilings))
    return {.device = device, .left_out = fmt::format("{} kernels are proposed", tilings.size())};
  const auto product = product_of(shape, device);
  product->multiply(0, 0);
  const std::vector<std::byte> want = product->some_rows();
  product->multiply(proposal, 0);
  if (product->some_rows() != want)
    return {.device = device, .left_out = "other bits than the library's choice"};
  Case c = timed(product, proposal);
  const GemmTiling& tiling = tilings[static_cast<size_t>(proposal)];
  c.figures = {{"tile", tiling.tile}, {"cluster", tiling.cluster}, {"option", tiling.option}};
  c.beside = std::make_shared<const Case>(timed(product, 0));
  return c;
}

/// 8B comes first, then 7B, 13B and 70B.
constexpr std::array<std::array<int64_t, 2>, 16> weights = {{{6144, 4096},
                                                             {4096, 4096},
                                                             {28672, 4096},
                                                             {4096, 14336},
                                                             {14336, 4096},
                                                             {12288, 4096},
                                                             {22016, 4096},
                                                             {4096, 11008},
                                                             {15360, 5120},
                                                             {5120, 5120},
                                                             {27648, 5120},
                                                             {5120, 13824},
                                                             {10240, 8192},
                                                             {8192, 8192},
                                                             {57344, 8192},
                                                             {8192, 28672}}};
constexpr std::array<int64_t, 4> rows = {2048, 4096, 8192, 16384};

const Register registered(85, [] {
  for (const Device device : devices()) {
    const bool multiplies = device.is_cuda() && cuda::supports_bf16(device.index);
    for (const auto& [n, k] : weights)
      for (const Op op : {Op::transpose, Op::none})
        for (const int64_t m : rows)
          for (int proposal = 1; multiplies && proposal < GemmProposal::most; ++proposal)
            add(device,
                fmt::format("product/{}/{}x{}/m{}/proposal{}",
                            op == Op::transpose ? "forward" : "dx", n, k, m, proposal),
                [=] {
                  return make_case({n, k, m, op}, proposal, device);
                });
  }
});

}  // namespace
}  // namespace qlab::bench
