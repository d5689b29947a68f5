// What no kernel of a GPU takes is refused where shapes are known, without a GPU; a launch that the
// GPU refuses names its kernel.
#include "core/gpu_limits.h"

#include "core/ops/attention.h"
#include "core/ops/cross_entropy.h"
#include "core/ops/gemm.h"
#include "core/ops/rms_norm.h"
#include "core/ops/rows.h"
#include "core/ops/swiglu.h"
#include "experiments/setup.h"
#include "experiments/stepper.h"
#include "nn/fold.h"
#include "quant/nf4_linear.h"
#include "tests/support/tiny_llama.h"

namespace qlab::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const Device paper_gpu = Device::cuda().meta(), paper_cpu = Device::cpu().meta();
constexpr int64_t too_many = int64_t{1} << 31;

Tensor on(Device device, const Shape& shape, DType dtype = DType::bf16) {
  return Tensor::empty(shape, dtype, device);
}

std::string attention_error(Device device, const AttentionShape& s, int64_t rows = 64,
                            int64_t sequences = 1) {
  const Tensor q = on(device, {rows, s.heads * s.head_dim}),
               k = on(device, {rows, s.kv_heads * s.head_dim}),
               cu = on(device, {sequences + 1}, DType::i32);
  return error_of([&] {
    const Attention a = attention(q, k, k, cu, cu, s);
    attention_backward(q, q, k, k, a.o, a.lse, cu, cu, s);
  });
}

TEST(GpuLimits, AttentionSaysWhichHeadsItTakes) {
  for (const int64_t head_dim : {8, 72, 256})
    EXPECT_EQ(attention_error(paper_gpu, {2, 1, head_dim, 64, 64}), "") << head_dim;
  for (const int64_t head_dim : {4, 84, 264}) {
    EXPECT_THAT(attention_error(paper_gpu, {2, 1, head_dim, 64, 64}),
                AllOf(HasSubstr("[attention] a GPU takes a head_dim that is a multiple of 8 up to "
                                "256, got " +
                                std::to_string(head_dim)),
                      HasSubstr(fmt::format("[64, {}]", 2 * head_dim))));
    EXPECT_EQ(attention_error(paper_cpu, {2, 1, head_dim, 64, 64}), "") << head_dim;
  }
  EXPECT_THAT(attention_error(paper_gpu, {65536, 1, 8, 64, 64}),
              HasSubstr("[attention] a GPU takes at most 65535 heads, got 65536"));
  EXPECT_THAT(attention_error(paper_gpu, {32, 8, 128, 8192, 8192}, 8192, int64_t{1} << 20),
              HasSubstr("[attention] a GPU takes at most 2147483647 tiles"));
}

TEST(GpuLimits, RowsAreCountedIn32Bits) {
  const auto expect_refused = [](const char* op, const std::function<void(Device)>& call) {
    EXPECT_THAT(error_of([&] { call(paper_gpu); }),
                AllOf(HasSubstr(fmt::format("[{}] a GPU takes at most 2147483647 ", op)),
                      HasSubstr("got 2147483648"), HasSubstr("on meta(cuda:0)")));
    EXPECT_EQ(error_of([&] { call(paper_cpu); }), "");
  };
  const auto matrix = [](Device d) { return on(d, {too_many, 8}); };
  expect_refused("rms_norm", [&](Device d) { rms_norm(matrix(d), on(d, {8}, DType::f32), 1e-5f); });
  expect_refused("swiglu", [&](Device d) { swiglu(matrix(d)); });
  expect_refused("gemm", [&](Device d) { matmul_nt(matrix(d), on(d, {8, 8})); });
  expect_refused("gemm", [&](Device d) { matmul_nn(on(d, {8, 8}), on(d, {8, too_many})); });
  expect_refused("gather_rows",
                 [&](Device d) { gather_rows(matrix(d), on(d, {1}, DType::i32), DType::bf16); });
  expect_refused("cross_entropy", [&](Device d) {
    cross_entropy_inplace(on(d, {too_many}, DType::f32), matrix(d), on(d, {too_many}, DType::i32),
                          {});
  });
}

TEST(GpuLimits, OtherTypesAreRefused) {
  const auto product = [](Device d) {
    matmul_nt(on(d, {8, 8}, DType::f64), on(d, {8, 8}, DType::f64));
  };
  EXPECT_ERROR(product(paper_gpu), "[gemm] a GPU takes float32, bfloat16 or float16, got float64");
  EXPECT_EQ(error_of([&] { product(paper_cpu); }), "");
}

TEST(GpuLimits, FoldedWeightsHaveAlignedRows) {
  const auto check = [](Device d, int64_t n, int64_t k, int64_t width) {
    check_foldable(Tensor::with_tail(n + width, k, width, DType::bf16, d).widened(k + width),
                   width);
  };
  check(paper_gpu, 60, 64, 16);
  check(paper_cpu, 64, 60, 16);
  EXPECT_ERROR(check(paper_gpu, 64, 60, 16), "[fold_adapters] a GPU folds adapters");
  EXPECT_ERROR(check(paper_gpu, 28672, 8192, 1 << 20), "[fold_adapters] a GPU takes at most");
  const Tensor narrow = Tensor::pitched(80, 80, 84, DType::bf16, paper_gpu);
  EXPECT_ERROR(check_foldable(narrow, 16),
               "[fold_adapters] a GPU takes rows that start at multiples of 16 bytes");
}

// A plan runs the step on meta; what a step would be refused for its plan is refused for.
TEST(GpuLimits, StepsAreRefusedWhenTheyArePlanned) {
  const auto plan = [](Device device, DType compute, int64_t hidden, int64_t head_dim) {
    LlamaConfig config = synthetic_config("tiny");
    config.hidden_size = hidden;
    config.head_dim = head_dim;
    const auto source = [](const std::string&, const Shape& shape) {
      return Tensor::empty(shape, DType::f32, Device::cpu().meta());
    };
    const Llama model(config, WeightSpec{}, compute, device, source);
    const auto adapter = fresh_adapter(model, {});
    const Tokens tokens = random_tokens(20, 1);
    BatchBuilder builder;
    builder.add({tokens.sequence()}, adapter.get(), true, 1.0f);
    Stepper stepper(model, Recompute::none);
    return error_of([&] { stepper.reserve(builder, true); });
  };
  EXPECT_EQ(plan(paper_gpu, DType::bf16, 64, 16), "");
  EXPECT_THAT(plan(paper_gpu, DType::bf16, 60, 16),
              AllOf(HasSubstr("[fold_adapters]"), HasSubstr("multiple of 8, got 60"),
                    HasSubstr("quant.compute_dtype: fp32")));
  EXPECT_EQ(plan(paper_gpu, DType::f32, 60, 16), "");
  EXPECT_THAT(plan(paper_gpu, DType::bf16, 64, 264), HasSubstr("[attention]"));
  EXPECT_EQ(plan(paper_cpu, DType::bf16, 60, 12), "");
}

TEST(GpuLimits, TheComputeTypeFollowsTheGpuItIsFor) {
  Config config;
  const Device turing = Device::gpu(75).meta(), ampere = Device::gpu(80).meta();
  EXPECT_EQ(compute_dtype(config, turing), DType::f16);
  EXPECT_EQ(compute_dtype(config, ampere), DType::bf16);
  EXPECT_EQ(compute_dtype(config, paper_cpu), DType::f32);
  config.quant.compute_dtype = "bf16";
  EXPECT_EQ(compute_dtype(config, ampere), DType::bf16);
  EXPECT_THAT(error_of([&] { compute_dtype(config, turing); }),
              AllOf(HasSubstr("quant.compute_dtype: bf16 needs"), HasSubstr("capability 7.5"),
                    HasSubstr("set fp16 or auto")));
}

// Each kernel by the capability asked for, whatever GPU is here.
TEST(GpuLimits, KernelsFollowTheGpuTheyAreFor) {
  const auto w = quantize_nf4(on(paper_gpu, {4096, 4096}), 64, true);
  const auto supported = [&](Nf4Kernel kernel, int capability) {
    return nf4_matmul_supported(kernel, w, Op::transpose, 8, DType::bf16,
                                Device::gpu(capability).meta());
  };
  EXPECT_TRUE(supported(Nf4Kernel::simt, 75));
  EXPECT_FALSE(supported(Nf4Kernel::mma, 75));
  EXPECT_TRUE(supported(Nf4Kernel::mma, 86));
  EXPECT_FALSE(supported(Nf4Kernel::lut, 89));
  EXPECT_TRUE(supported(Nf4Kernel::lut, 90));
  EXPECT_FALSE(supported(Nf4Kernel::wgmma, 89));
  EXPECT_TRUE(supported(Nf4Kernel::wgmma, 90));
  EXPECT_FALSE(supported(Nf4Kernel::wgmma, 120));
}

class CudaErrors : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "needs a GPU and a build with CUDA";
  }
};

// The port is called past its entry, which would refuse so many heads: more blocks along y than a
// grid has.
TEST_F(CudaErrors, ARefusedLaunchNamesTheKernel) {
  const AttentionShape shape{70000, 70000, 8, 1, 1};
  const auto zeros = [](const Shape& s, DType dtype) {
    return Tensor::zeros(s, dtype, Device::cuda());
  };
  const Tensor q = zeros({1, 70000 * 8}, DType::f32), lse = zeros({1, 70000}, DType::f32),
               cu = Tensor::from_vector(std::vector<int32_t>{0, 1}, {2}, Device::cuda());
  EXPECT_THAT(
      error_of([&] { cuda::attention(q, lse, q, q, q, cu, cu, shape, {}); }),
      AllOf(HasSubstr("[attention]"), HasSubstr("attention_kernel<float, 1>"),
            HasSubstr("1 x 70000 x 1 blocks of 256 threads"), HasSubstr("cudaErrorInvalid")));
  // Nothing of it is left for the next launch.
  EXPECT_EQ(values(rms_norm(q.slice_cols(0, 8), zeros({8}, DType::f32), 1.0f).y),
            std::vector<double>(8, 0.0));
}

// In a process of its own: after a fault the device is of no use to the one that caused it.
TEST_F(CudaErrors, LargeFaultsSayHowToFindTheirKernel) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto read_outside = [] {
    try {
      const Tensor table = Tensor::zeros({2, 4096}, DType::f32, Device::cuda());
      const Tensor index = Tensor::from_vector(
          std::vector<int32_t>{std::numeric_limits<int32_t>::max()}, {1}, Device::cuda());
      const Tensor y = gather_rows(table, index, DType::f32);
      synchronize(Device::cuda());
    } catch (const Error& error) {
      std::fputs(error.what(), stderr);
      std::_Exit(2);
    }
  };
#if defined(QLAB_SYNC_LAUNCHES)
  EXPECT_EXIT(read_outside(), testing::ExitedWithCode(2), "gather_rows.*elementwise_kernel");
#else
  EXPECT_EXIT(read_outside(), testing::ExitedWithCode(2), "illegal memory access.*--preset dev");
#endif
}

}  // namespace
}  // namespace qlab::test
