// Kernels whose warps hand shared memory to each other and to tensor copies, called again and again
// after other data has gone through the caches: memory then answers late and out of order, which is
// when a barrier that is passed too early shows. Every call must give the bits of the first.
#include "core/ops/attention.h"
#include "quant/nf4_linear.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

class CudaColdCalls : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no GPU";
    if (!cuda::supports_bf16(0)) GTEST_SKIP() << "a GPU without bf16";
    const auto block = [] { return Tensor::empty({int64_t{256} << 20}, DType::u8, gpu); };
    from_ = block(), to_ = block();
  }

  /// Normal values, repeated after a prime number of them.
  static Tensor normals_like(const Shape& shape, double scale) {
    constexpr int64_t period = 100003;
    std::vector<double> some = normals(period, 5);
    some.resize(period);
    for (double& v : some) v *= scale;
    const Tensor x = Tensor::empty({shape.numel()}, DType::bf16, gpu);
    int64_t filled = std::min(period, x.numel());
    copy(x.slice_rows(0, filled), tensor(some, {period}, cuda_bf16).slice_rows(0, filled));
    for (int64_t part = 0; filled < x.numel(); filled += part) {
      part = std::min(filled / period * period, x.numel() - filled);
      copy(x.slice_rows(filled, filled + part), x.slice_rows(0, part));
    }
    synchronize(gpu);
    return x.view(shape);
  }

  template <class Call>
  void expect_equal_calls(int calls, const Call& call) {
    const auto results = [&] {
      std::vector<Tensor> host;
      for (const Tensor& x : call())
        host.push_back((x.contiguous() ? x : x.clone()).to(Device::cpu()));
      synchronize(gpu);
      return host;
    };
    const std::vector<Tensor> first = results();
    int different = 0;
    for (int i = 1; i < calls; ++i) {
      copy(to_, from_);
      const std::vector<Tensor> next = results();
      for (size_t j = 0; j < first.size(); ++j)
        different += std::memcmp(next[j].raw(), first[j].raw(), first[j].bytes()) != 0 ? 1 : 0;
    }
    EXPECT_EQ(different, 0) << "results of " << calls << " calls";
  }

  inline static const Device gpu = Device::cuda();
  Tensor from_, to_;
};

// The first two have long rows of W, where most went wrong. On an H100 100 rows take the tile of
// 128 with the contraction in three parts, 200 rows with it whole, and that of 256 otherwise.
TEST_F(CudaColdCalls, LargeNf4Products) {
  struct Product {
    Shape shape;
    int64_t rows;
    int calls;
  };
  int compared = 0;
  for (const auto& [shape, rows, calls] :
       {Product{{8192, 28672}, 4, 300}, {{8192, 28672}, 200, 100}, {{4096, 4096}, 100, 400}}) {
    const Nf4Tensor w = quantize_nf4(normals_like(shape, 0.02), 64, true);
    for (const Op op : {Op::transpose, Op::none}) {
      const Tensor x = normals_like({rows, shape[op == Op::transpose ? 1 : 0]}, 1);
      for (const Nf4Kernel kernel : {Nf4Kernel::mma, Nf4Kernel::lut, Nf4Kernel::wgmma,
                                     Nf4Kernel::wgmma2, Nf4Kernel::wgmma3}) {
        if (!nf4_matmul_supported(kernel, w, op, rows, DType::bf16, gpu)) continue;
        SCOPED_TRACE(
            fmt::format("{} W {} op {} M {}", name_of(kernel), shape, static_cast<int>(op), rows));
        ++compared;
        expect_equal_calls(calls, [&] {
          const Tensor y =
              Tensor::empty({rows, shape[op == Op::transpose ? 0 : 1]}, DType::bf16, gpu);
          nf4_matmul(y, x, w, op, kernel);
          return std::vector{y};
        });
      }
    }
  }
  if (compared == 0) GTEST_SKIP() << "no such kernel";
}

TEST_F(CudaColdCalls, LargeAttention) {
  const std::vector<int32_t> ends{0, 700, 1990, 2048};
  const AttentionShape shape{32, 8, 128, 1290, 1290};
  const int64_t tokens = ends.back();
  const Tensor cu = Tensor::from_vector(ends, {std::ssize(ends)}, gpu);
  const Tensor q = normals_like({tokens, shape.heads * shape.head_dim}, 1),
               g = normals_like(q.shape(), 1),
               k = normals_like({tokens, shape.kv_heads * shape.head_dim}, 1),
               v = normals_like(k.shape(), 1);
  expect_equal_calls(100, [&] {
    const Attention a = attention(q, k, v, cu, cu, shape);
    return std::vector{a.o, a.lse, attention_backward(g, q, k, v, a.o, a.lse, cu, cu, shape)};
  });
}

}  // namespace
}  // namespace qlab::test
