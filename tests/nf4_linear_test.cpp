#include "quant/nf4_dispatch.h"
#include "quant/nf4_dispatch_table.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using Nf4LinearTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, Nf4LinearTest, all_cases, name);

/// On the CPU they are one.
std::vector<Nf4Kernel> kernels(Device device) {
  if (!device.is_cuda()) return {Nf4Kernel::mma};
  return {Nf4Kernel::simt,  Nf4Kernel::mma,    Nf4Kernel::lut,
          Nf4Kernel::wgmma, Nf4Kernel::wgmma2, Nf4Kernel::wgmma3};
}
bool of_warpgroups(Nf4Kernel kernel) { return kernel >= Nf4Kernel::wgmma; }
constexpr Op ops[] = {Op::transpose, Op::none};

int64_t inputs(const Nf4Tensor& w, Op op) { return w.shape[op == Op::transpose ? 1 : 0]; }
int64_t outputs(const Nf4Tensor& w, Op op) { return w.shape[op == Op::transpose ? 0 : 1]; }

Tensor decoded(const Nf4Tensor& w, DType dtype, Device device) {
  const Tensor y = Tensor::empty(w.shape, dtype, device);
  dequantize_nf4(y, w);
  return y;
}
/// In f64, from the values that dequantize_nf4 gives in x's dtype.
Tensor reference(const Tensor& x, const Nf4Tensor& w, Op op, const Tensor& addend = {}) {
  const Tensor weight = as_reference(decoded(w, x.dtype(), x.device()));
  const Tensor y = addend.defined()
                       ? as_reference(addend)
                       : Tensor::zeros({x.dim(0), outputs(w, op)}, DType::f64, Device::cpu());
  gemm(y, as_reference(x), Op::none, weight, op, 1.0f, 1.0f);
  return y;
}
Tensor product(const Tensor& x, const Nf4Tensor& w, Op op, Nf4Kernel kernel) {
  const Tensor y = tensor(std::vector<double>(x.dim(0) * outputs(w, op), NAN),
                          {x.dim(0), outputs(w, op)}, Case{x.device(), x.dtype()});
  nf4_matmul(y, x, w, op, kernel);
  return y;
}

/// x [1, 32] of ones with one two, and W of two codes: sums that one can write down.
TEST_P(Nf4LinearTest, Golden) {
  std::vector<double> v(8 * 32, 0), ones(32, 1);
  for (int row = 0; row < 8; ++row) v[32 * row + row] = row % 2 == 0 ? 2 : -2;
  ones[1] = 2;
  const Nf4Tensor w = quantize_nf4(tensor(v, {8, 32}, GetParam()), 32, false);
  const Tensor x = tensor(ones, {1, 32}, GetParam());
  const Tensor g = tensor({1, 1, 1, 1, 0.5, 0, 0, 3}, {1, 8}, GetParam());
  std::vector<double> dx(32, 0);
  const double expected[] = {2, -2, 2, -2, 1, 0, 0, -6};
  std::copy(std::begin(expected), std::end(expected), dx.begin());
  for (const Nf4Kernel kernel : kernels(device())) {
    if (!nf4_matmul_supported(kernel, w, Op::none, 1, dtype(), device())) continue;
    EXPECT_EQ(values(product(x, w, Op::transpose, kernel)),
              (std::vector<double>{2, -4, 2, -2, 2, -2, 2, -2}));
    EXPECT_EQ(values(product(g, w, Op::none, kernel)), dx);
  }
}

TEST_P(Nf4LinearTest, MatchesDecodedValues) {
  const Shape shapes[] = {{8, 32},    {24, 96},   {64, 64},    {136, 160},  {128, 256},
                          {264, 32},  {192, 576}, {576, 1536}, {1000, 704}, {256, 192},
                          {320, 512}, {256, 64},  {512, 448},  {448, 512}};
  for (const Shape& shape : shapes)
    for (const int64_t block_size : {32, 64, 256, 4096})
      for (const bool nested : {false, true}) {
        const Nf4Tensor w = quantize_nf4(random(shape, 0.05), block_size, nested);
        for (const Op op : ops)
          for (const int64_t m : {1, 2, 7, 8, 9, 40, 130})
            for (const Nf4Kernel kernel : kernels(device())) {
              if (!nf4_matmul_supported(kernel, w, op, m, dtype(), device())) continue;
              SCOPED_TRACE(fmt::format("{} W {} blocks of {} nested {} op {} M {}", name_of(kernel),
                                       shape, block_size, nested, static_cast<int>(op), m));
              const Tensor x = random({m, inputs(w, op)});
              const Tensor y = product(x, w, op, kernel);
              const double terms = static_cast<double>(inputs(w, op));
              expect_close(y, reference(x, w, op), inputs(w, op), 0.05 * std::sqrt(terms));
              expect_same_bits(y, product(x, w, op, kernel));
            }
      }
}

TEST_P(Nf4LinearTest, AddsAnotherTensorAndHonoursPitches) {
  const Nf4Tensor narrow = quantize_nf4(random({160, 192}, 0.05), 64, true);
  const Nf4Tensor wide = quantize_nf4(random({512, 768}, 0.05), 64, true);
  for (const Op op : ops)
    for (const int64_t m : {3, 70})
      for (const Nf4Kernel kernel : kernels(device())) {
        const Nf4Tensor& w = of_warpgroups(kernel) ? wide : narrow;
        if (!nf4_matmul_supported(kernel, w, op, m, dtype(), device())) continue;
        SCOPED_TRACE(fmt::format("{} op {} M {}", name_of(kernel), static_cast<int>(op), m));
        const int64_t in = inputs(w, op), out = outputs(w, op);
        const Tensor x = random({m, in + 24}).slice_cols(16, 16 + in);
        const Tensor wide = random({m, out + 32}), guard = wide.clone();
        const Tensor y = wide.slice_cols(16, 16 + out), residual = random({m, out + 8});
        const Tensor added = residual.slice_cols(0, out);
        const Tensor expected = reference(x.clone(), w, op, added.clone());
        nf4_matmul(y, x, w, op, kernel, added);
        expect_close(y, expected, in, std::sqrt(static_cast<double>(in)) * 0.05 + 1);
        expect_same_bits(wide.slice_cols(0, 16), guard.slice_cols(0, 16));
        expect_same_bits(wide.slice_cols(16 + out, 32 + out), guard.slice_cols(16 + out, 32 + out));
        const Tensor own = added.clone();
        nf4_matmul(own, x, w, op, kernel, own);
        expect_same_bits(own, y);
      }
}

// A GPU begins to read codes and scales while the kernel before still runs: what kernels wrote
// right before must be there nevertheless. The scales change from tensor to tensor.
TEST_P(Nf4LinearTest, ReadsWhatWasWrittenRightBefore) {
  if (dtype() == DType::f64) GTEST_SKIP() << "the reference promises no bits";
  const Shape shape{256, 1024};
  const int64_t blocks = shape.numel() / 64;
  const Tensor x = random({4, 1024});
  std::vector<Tensor> inputs;
  for (int i = 0; i < 24; ++i) inputs.push_back(random(shape, 0.01 * (1 + i % 5)));
  int compared = 0;
  for (const Nf4Kernel kernel : kernels(device()))
    for (const bool nested : {false, true}) {
      const Nf4Tensor w = quantize_nf4(inputs[0], 64, nested);
      if (!nf4_matmul_supported(kernel, w, Op::transpose, 4, dtype(), device())) continue;
      const Case f32{device(), DType::f32};
      const Tensor absmax = nested ? tensor(std::vector<double>(blocks), {blocks}, f32) : w.absmax;
      const Tensor sums =
          nested ? Tensor::zeros({blocks / nested_block_size}, DType::f64, device()) : Tensor();
      std::vector<Tensor> now, want;
      for (size_t i = 0; i < inputs.size(); ++i)
        now.push_back(Tensor::zeros({4, 256}, dtype(), device()));
      synchronize(device());
      for (size_t i = 0; i < inputs.size(); ++i) {
        on_device(
            device(), [&] { cpu::quantize_nf4(w.codes, absmax, sums, inputs[i], 64); },
            [&] { cuda::quantize_nf4(w.codes, absmax, sums, inputs[i], 64); });
        if (nested)
          on_device(
              device(), [&] { cpu::quantize_scales(w, absmax, sums); },
              [&] { cuda::quantize_scales(w, absmax, sums); });
        nf4_matmul(now[i], x, w, Op::transpose, kernel);
      }
      for (const Tensor& input : inputs) {
        const Nf4Tensor alone = quantize_nf4(input, 64, nested);
        synchronize(device());
        want.push_back(product(x, alone, Op::transpose, kernel));
        synchronize(device());
      }
      for (size_t i = 0; i < inputs.size(); ++i, ++compared) {
        SCOPED_TRACE(fmt::format("{} nested {}, number {}", name_of(kernel), nested, i));
        expect_same_bits(now[i], want[i]);
      }
    }
  if (compared == 0) GTEST_SKIP() << "no such kernel";
}

// What lets trials train together, and a prompt be read at once or in pieces.
TEST_P(Nf4LinearTest, RowsAreIndependentOfTheirNumberAndPlace) {
  if (dtype() == DType::f64) GTEST_SKIP() << "the reference promises no bits";
  const int64_t total = 600;
  const Nf4Tensor narrow = quantize_nf4(random({136, 288}, 0.05), 64, true);
  const Nf4Tensor wide = quantize_nf4(random({256, 512}, 0.05), 64, true);
  const std::vector<int32_t> offset = integers(301, total - 300, 4);
  for (const Op op : ops)
    for (const Nf4Kernel kernel : kernels(device())) {
      const Nf4Tensor& w = kernel >= Nf4Kernel::lut ? wide : narrow;
      const Tensor x = random({total, inputs(w, op)});
      for (int64_t m = 1; m <= 300; m += device().is_cuda() || m < 18 ? 1 : 37) {
        if (!nf4_matmul_supported(kernel, w, op, m, dtype(), device())) continue;
        const int64_t begin = offset[m];
        const Tensor y = product(x.slice_rows(begin, begin + m), w, op, kernel);
        for (const int64_t i : {int64_t{0}, m / 2, m - 1}) {
          const Tensor row = product(x.slice_rows(begin + i, begin + i + 1), w, op, kernel);
          ASSERT_TRUE(bytes_of(row) == bytes_of(y.slice_rows(i, i + 1)))
              << name_of(kernel) << " op " << static_cast<int>(op) << ", row " << i << " of " << m;
        }
      }
    }
}

/// More than the eight groups of 16 that lut adds together on each of 144 multiprocessors, the most
/// that compute capability 9.0 has.
constexpr int64_t many_outputs = 18'600;

// Warps without columns in the first panel or the last, several panels, blocks with several batches
// of groups of outputs, and a group that is not full.
TEST_P(Nf4LinearTest, LookUpPanelsAndBatches) {
  using enum Nf4Kernel;
  if (!device().is_cuda()) GTEST_SKIP() << "the kernel runs on a GPU alone";
  if (dtype() != DType::bf16) GTEST_SKIP() << "the kernel takes bf16 alone";
  int compared = 0;
  for (const Shape& shape :
       {Shape{40, 64}, {40, 4032}, {24, 4160}, {40, 8448}, {many_outputs, 128}})
    for (const bool nested : {false, true}) {
      const Nf4Tensor w = quantize_nf4(random(shape, 0.05), 64, nested);
      for (const int64_t m : {1, 3, 8}) {
        if (!nf4_matmul_supported(lut, w, Op::transpose, m, dtype(), device())) continue;
        SCOPED_TRACE(fmt::format("W {} nested {} M {}", shape, nested, m));
        const Tensor x = random({m, shape[1]});
        const Tensor y = product(x, w, Op::transpose, lut);
        expect_close(y, reference(x, w, Op::transpose), shape[1],
                     0.05 * std::sqrt(static_cast<double>(shape[1])));
        expect_same_bits(y, product(x, w, Op::transpose, lut));
        ++compared;
      }
    }
  if (compared == 0) GTEST_SKIP() << "no such kernel";
}

// Panels and batches at once; beside another kernel, since the host would take long.
TEST_P(Nf4LinearTest, LargeLookUpsAgreeWithMma) {
  using enum Nf4Kernel;
  if (!device().is_cuda()) GTEST_SKIP() << "the kernel runs on a GPU alone";
  if (dtype() != DType::bf16) GTEST_SKIP() << "the kernel takes bf16 alone";
  const int64_t k = 4160;
  const Nf4Tensor w = quantize_nf4(random({many_outputs, k}, 0.05), 64, true);
  if (!nf4_matmul_supported(lut, w, Op::transpose, 8, dtype(), device()))
    GTEST_SKIP() << "no such kernel";
  const Tensor x = random({8, k});
  for (const int64_t m : {1, 3, 8}) {
    const Tensor some = x.slice_rows(0, m), y = product(some, w, Op::transpose, lut);
    expect_close(y, as_reference(product(some, w, Op::transpose, mma)), k,
                 0.05 * std::sqrt(static_cast<double>(k)));
    expect_same_bits(y, product(x, w, Op::transpose, lut).slice_rows(0, m));
  }
}

// Two panels, the second of which only some warps have, and a group that is not full.
TEST_P(Nf4LinearTest, LookUpRowsAreIndependentInEveryPanel) {
  const auto lut = Nf4Kernel::lut;
  const Nf4Tensor w = quantize_nf4(random({264, 4160}, 0.05), 64, true);
  if (!device().is_cuda() || !nf4_matmul_supported(lut, w, Op::transpose, 1, dtype(), device()))
    GTEST_SKIP() << "no such kernel";
  const Tensor x = random({8, 4160});
  const Tensor all = product(x, w, Op::transpose, lut);
  for (int64_t m = 1; m <= 8; ++m)
    for (const int64_t begin : {int64_t{0}, 8 - m})
      expect_same_bits(product(x.slice_rows(begin, begin + m), w, Op::transpose, lut),
                       all.slice_rows(begin, begin + m));
}

// lut brings x into the range of fp16, row by row, and must lose nothing that counts in a sum; what
// is no number stays so, in its own row.
TEST_P(Nf4LinearTest, LookUpKeepsTheRangeOfX) {
  if (dtype() != DType::bf16) GTEST_SKIP() << "the kernel takes bf16 alone";
  const auto lut = Nf4Kernel::lut;
  const int64_t k = 640;
  const Nf4Tensor w = quantize_nf4(random({48, k}, 0.05), 64, true);
  if (!nf4_matmul_supported(lut, w, Op::transpose, 1, dtype(), device()))
    GTEST_SKIP() << "no such kernel";
  // 2e-39 is among bf16's denormals, 1e-36 below what a factor of 2^97 would save.
  const double factors[] = {1e30, 1e-30, 1, 1, 0, 1e-36, 2e-39};
  constexpr int64_t rows = std::ssize(factors);
  std::vector<double> v = normals(rows * k, 7);
  for (int64_t i = 0; i < rows * k; ++i) v[i] *= factors[i / k];
  for (int64_t i = 0; i < k; ++i) v[2 * k + i] *= std::pow(2.0, -(i % 40));  // 40 binades
  const Tensor x = tensor(v, {rows, k}, GetParam());
  const Tensor y = product(x, w, Op::transpose, lut);
  // Results of the smallest rows are denormals themselves, so that they are compared by absolute
  // steps of those.
  const double step = std::pow(2.0, -133);
  for (int64_t row = 0; row < rows; ++row) {
    SCOPED_TRACE(row);
    const double size = factors[row] * 0.05 * std::sqrt(static_cast<double>(k));
    const Tensor want = reference(x.slice_rows(row, row + 1).clone(), w, Op::transpose);
    const std::vector<double> got = values(y.slice_rows(row, row + 1)), wanted = values(want);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_NEAR(got[i], wanted[i], size / 100 + std::abs(wanted[i]) / 128 + step) << i;
  }
  const std::vector<double> without = values(y);
  const auto differs_only_in = [&](int64_t row) {
    const std::vector<double> with =
        values(product(tensor(v, {rows, k}, GetParam()), w, Op::transpose, lut));
    for (int64_t i = 0; i < rows * 48; ++i)
      if (i / 48 == row)
        EXPECT_FALSE(std::isfinite(with[i])) << i;
      else
        EXPECT_EQ(with[i], without[i]) << i;
  };
  const std::vector<double> finite = v;
  for (const double no_number : {double{INFINITY}, std::nan("")}) {
    SCOPED_TRACE(no_number);
    v[3 * k + 5] = no_number;
    differs_only_in(3);
    std::fill(v.begin() + 3 * k, v.begin() + 4 * k, no_number);
    differs_only_in(3);
    v = finite;
  }
}

// Once in each tile, few enough for racecheck: the wide ones of 64, 128 and 256 rows, and the
// narrow ones whose two parts meet in memory.
TEST_P(Nf4LinearTest, EachWarpgroupTile) {
  using enum Nf4Kernel;
  struct Tile {
    Nf4Kernel kernel;
    int64_t outputs, rows;
  };
  const Nf4Tensor one = quantize_nf4(random({256, 256}, 0.05), 64, true);
  if (!device().is_cuda() || !nf4_matmul_supported(wgmma, one, Op::none, 1, dtype(), device()))
    GTEST_SKIP() << "no such kernel";
  for (const auto& [kernel, out, rows] :
       {Tile{wgmma, 512, 40}, Tile{wgmma, 4096, 257}, Tile{wgmma, 16384, 257},
        Tile{wgmma3, 512, 70}, Tile{wgmma2, 256, 40}, Tile{wgmma2, 256, 100},
        Tile{wgmma2, 4096, 200}, Tile{wgmma2, 256, 257}})
    for (const Op op : ops) {
      SCOPED_TRACE(fmt::format("{} op {} outputs {} M {}", name_of(kernel), static_cast<int>(op),
                               out, rows));
      const Shape shape = op == Op::transpose ? Shape{out, 256} : Shape{256, out};
      const Nf4Tensor w = quantize_nf4(random(shape, 0.05), 64, true);
      const Tensor x = random({rows, 256}), y = product(x, w, op, kernel);
      expect_close(y, reference(x, w, op), 256, 0.05 * std::sqrt(256.0));
      expect_same_bits(product(x, w, op, kernel), y);
      expect_same_bits(product(x.slice_rows(0, 30), w, op, kernel), y.slice_rows(0, 30));
    }
}

// Each of their tiles takes part, of 64, 128 and 256 rows of x, with the contraction in one to
// three parts; many outputs make the wider tiles the faster ones.
TEST_P(Nf4LinearTest, WarpgroupTilesAgree) {
  const Nf4Tensor square = quantize_nf4(random({512, 512}, 0.05), 64, true);
  const int64_t rows = 600, out = 16384;
  for (const Nf4Kernel kernel : {Nf4Kernel::wgmma, Nf4Kernel::wgmma2, Nf4Kernel::wgmma3}) {
    if (!device().is_cuda() ||
        !nf4_matmul_supported(kernel, square, Op::none, 1, dtype(), device()))
      GTEST_SKIP() << "no such kernel";
    for (const Op op : ops)
      for (const int64_t m : {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300}) {
        SCOPED_TRACE(fmt::format("{} op {} M {}", name_of(kernel), static_cast<int>(op), m));
        const Tensor x = random({m, 512});
        expect_close(product(x, square, op, kernel), reference(x, square, op), 512,
                     0.05 * std::sqrt(512.0));
      }
    for (const Shape& shape : {Shape{16384, 320}, Shape{320, 16384}}) {
      const bool nested = shape[0] > shape[1];
      const Nf4Tensor w = quantize_nf4(random(shape, 0.05), 64, nested);
      const Op op = nested ? Op::transpose : Op::none;
      SCOPED_TRACE(fmt::format("{} op {}", name_of(kernel), static_cast<int>(op)));
      const Tensor x = random({rows, 320}), addend = random({rows, out + 8}).slice_cols(0, out);
      const auto plus = [&](int64_t m) {
        const Tensor y = Tensor::pitched(m, out, out + 16, dtype(), device());
        nf4_matmul(y, x.slice_rows(0, m), w, op, kernel, addend.slice_rows(0, m));
        return y;
      };
      const Tensor all = product(x, w, op, kernel), sums = plus(rows);
      for (const int64_t m : {1, 64, 65, 128, 129, 255, 256, 257, 300}) {
        SCOPED_TRACE(m);
        expect_same_bits(product(x.slice_rows(0, m), w, op, kernel), all.slice_rows(0, m));
        expect_same_bits(plus(m), sums.slice_rows(0, m));
      }
      for (const int64_t first : {0, 570}) {
        const Tensor some = x.slice_rows(first, first + 30);
        const Tensor more = addend.slice_rows(first, first + 30).clone();
        expect_close(all.slice_rows(first, first + 30), reference(some, w, op), 320,
                     0.05 * std::sqrt(320.0));
        expect_close(sums.slice_rows(first, first + 30), reference(some, w, op, more), 320,
                     0.05 * std::sqrt(320.0) + 1);
      }
    }
  }
}

TEST_P(Nf4LinearTest, NoRows) {
  const Nf4Tensor w = quantize_nf4(random({8, 32}), 32, false);
  nf4_matmul(random({0, 8}), random({0, 32}), w, Op::transpose, Nf4Kernel::mma);
}

TEST(Nf4Linear, ADryRunNeedsTheSameMemory) {
  const Nf4Tensor w = quantize_nf4(tensor(normals(64 * 96, 1), {64, 96}, cpu_f32), 64, true);
  const auto peak = [&](Device device) {
    const Tensor x = Tensor::zeros({5, 96}, DType::f32, device);
    const Tensor y = Tensor::zeros({5, 64}, DType::f32, device);
    reset_peak(device);
    const int64_t before = memory_account(device).total;
    nf4_matmul(y, x, w, Op::transpose, Nf4Kernel::mma);
    return memory_account(device).peak - before;
  };
  EXPECT_EQ(peak(Device::cpu().meta()), peak(Device::cpu()));
}

TEST(Nf4Linear, ManyRowsAndTheCpuDecodeFirst) {
  Nf4Tensor w;
  w.shape = {4096, 4096};
  const Device gpu = Device::cuda().meta();
  for (const Op op : ops) {
    EXPECT_TRUE(fastest_nf4_kernel(w, op, 1, DType::bf16, gpu).has_value());
    EXPECT_FALSE(fastest_nf4_kernel(w, op, 4096, DType::bf16, gpu).has_value());
    EXPECT_FALSE(fastest_nf4_kernel(w, op, 1, DType::f32, gpu).has_value());
    EXPECT_FALSE(fastest_nf4_kernel(w, op, 1, DType::f32, Device::cpu()).has_value());
  }
}

TEST(Nf4Linear, KernelsOfHopper) {
  using enum Nf4Kernel;
  Nf4Tensor w;
  w.block_size = 64;
  const auto kernel = [&](const Shape& shape, Op op, int64_t rows, int capability = 90) {
    w.shape = shape;
    return fastest_nf4_kernel(w, op, rows, DType::bf16, Device::gpu(capability).meta());
  };
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 8), lut);
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 9), mma);
  EXPECT_EQ(kernel({14336, 4096}, Op::none, 8), mma);
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 8, 80), mma);
  EXPECT_EQ(kernel({14336, 4096 + 32}, Op::transpose, 8), mma);  // columns that lut does not take
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 32), mma);
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 33), wgmma);
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 512), wgmma);
  EXPECT_EQ(kernel({14336, 4096}, Op::transpose, 513), std::nullopt);
  EXPECT_EQ(kernel({14336, 4096}, Op::none, 64), wgmma3);
  EXPECT_EQ(kernel({4096, 4096}, Op::none, 128), wgmma3);
  EXPECT_EQ(kernel({4096, 4096}, Op::none, 129), wgmma2);
  EXPECT_EQ(kernel({4096, 4096}, Op::transpose, 513), std::nullopt);
  EXPECT_EQ(kernel({4096, 14336}, Op::transpose, 1024), wgmma);
  EXPECT_EQ(kernel({4096, 14336}, Op::transpose, 1025), std::nullopt);
  EXPECT_EQ(kernel({4096, 4096}, Op::transpose, 64, 80), mma);
  EXPECT_EQ(kernel({4104, 4096}, Op::transpose, 64), mma);  // outputs that they do not take
}

TEST(Nf4Linear, ForAtMostEightRowsAKnownGpuLooksUp) {
  Nf4Tensor w;
  w.block_size = 64;
  for (const Shape& shape : {Shape{4096, 4096}, {14336, 4096}, {1024, 8192}, {200, 8320}})
    for (int64_t rows = 1; rows <= 9; ++rows) {
      w.shape = shape;
      const auto kernel = fastest_nf4_kernel("NVIDIA H100 80GB HBM3", w, Op::transpose, rows,
                                             DType::bf16, Device::gpu(90).meta());
      EXPECT_EQ(kernel == Nf4Kernel::lut, rows <= 8) << shape.str() << ", " << rows << " rows";
    }
}

TEST(Nf4Linear, LookUpsRefuseWhatTheyDoNotTake) {
  const auto refused = [](const Shape& shape, int64_t block_size, Op op, int64_t rows,
                          int capability) {
    const Device gpu = Device::gpu(capability).meta();
    const Nf4Tensor w = quantize_nf4(Tensor::empty(shape, DType::bf16, gpu), block_size, true);
    const int64_t in = shape[op == Op::transpose ? 1 : 0], out = shape[op == Op::transpose ? 0 : 1];
    nf4_matmul(Tensor::empty({rows, out}, DType::bf16, gpu),
               Tensor::empty({rows, in}, DType::bf16, gpu), w, op, Nf4Kernel::lut);
  };
  const Op t = Op::transpose;
  refused({64, 128}, 64, t, 8, 90);  // none of it
  EXPECT_ERROR(refused({64, 128}, 64, t, 9, 90), "no lut kernel for 9 rows");
  EXPECT_ERROR(refused({64, 128}, 64, Op::none, 8, 90), "op transpose, at most 8 rows");
  EXPECT_ERROR(refused({64, 96}, 64, t, 8, 90), "K of 64");
  EXPECT_ERROR(refused({64, 128}, 32, t, 8, 90), "blocks of 64 and more");
  for (const int capability : {75, 80, 89, 100, 120})
    EXPECT_ERROR(refused({64, 128}, 64, t, 8, capability), "compute capability 9.0");
}

TEST(Nf4Linear, WhereTheKernelOfAKnownGpuRefusesAnotherIsTaken) {
  using enum Nf4Kernel;
  Nf4Tensor w;
  const auto kernel = [&](const Shape& shape, int64_t block_size, int capability) {
    w.shape = shape, w.block_size = block_size;
    return fastest_nf4_kernel("NVIDIA H100 80GB HBM3", w, Op::transpose, 64, DType::bf16,
                              Device::gpu(capability).meta());
  };
  EXPECT_GE(kernel({4096, 4096}, 64, 90), wgmma);  // which of these is for the table to say
  EXPECT_EQ(kernel({4096, 4096}, 32, 90), mma);  // blocks
  EXPECT_EQ(kernel({4104, 4096}, 64, 90), mma);  // outputs
  EXPECT_EQ(kernel({4096, 4096}, 64, 80), mma);  // its PTX for older GPUs
  EXPECT_EQ(kernel({4096, 4096}, 64, 75), std::nullopt);
}

// The matrix itself, else the smallest that is no smaller, else the largest; then the number of
// rows.
TEST(Nf4Linear, LinesOfTheTable) {
  using enum Nf4Kernel;
  const Op op = Op::transpose;
  const std::vector<Nf4Line> lines{{"", op, 100, 1, 8, simt},
                                   {"G", op, 2, 8, 1, simt},
                                   {"G", op, 2, 8, 16, mma},
                                   {"G", op, 8, 2, 16, std::nullopt},
                                   {"G", op, 4, 8, 4, mma},
                                   {"G", op, 64, 8, 4, wgmma},
                                   {"G", Op::none, 4, 8, 1, std::nullopt}};
  const auto kernel = [&](std::string_view gpu, int64_t n, int64_t k, int64_t rows) {
    return kernel_of(lines, gpu, op, n, k, rows);
  };
  EXPECT_EQ(kernel("G", 2, 8, 1), simt);
  EXPECT_EQ(kernel("G", 2, 8, 2), mma);
  EXPECT_EQ(kernel("G", 2, 8, 17), std::nullopt);
  EXPECT_EQ(kernel("G", 8, 2, 1), std::nullopt);  // as many elements, another matrix
  EXPECT_EQ(kernel("G", 4, 4, 1), simt);          // the first of equal ones
  EXPECT_EQ(kernel("G", 3, 6, 4), mma);
  EXPECT_EQ(kernel("G", 5, 8, 1), wgmma);
  EXPECT_EQ(kernel("G", 500, 8, 1), wgmma);
  EXPECT_EQ(kernel("", 2, 8, 8), simt);
  EXPECT_EQ(kernel("Another", 2, 8, 1), std::nullopt);
  EXPECT_EQ(kernel_of(lines, "G", Op::none, 2, 8, 1), std::nullopt);
}

// A part of the contraction follows from the matrix alone, and none is empty.
TEST(Nf4Linear, PartsCoverTheContraction) {
  for (const int64_t n : {8, 576, 1024, 4096, 14336, 65536})
    for (const int64_t k : {32, 576, 4096, 14336})
      for (const Op op : ops)
        for (const Nf4Kernel kernel : {Nf4Kernel::simt, Nf4Kernel::mma}) {
          const int64_t step = kernel == Nf4Kernel::simt ? 16 : 128;
          const int64_t depth = op == Op::transpose ? k : n, steps = (depth + step - 1) / step;
          const int64_t parts = cuda::nf4_splits(kernel, op, n, k);
          ASSERT_GE(parts, 1);
          const int64_t own = (steps + parts - 1) / parts;
          EXPECT_LT((parts - 1) * own, steps) << n << " x " << k;
          EXPECT_EQ(cuda::nf4_workspace_rows(kernel, op, n, k, 3), parts > 1 ? 3 * parts : 0);
        }
}

// One of two parts of a whole tile lies in memory; with more rows tiles are wide.
TEST(Nf4Linear, WorkspaceOfTwoParts) {
  const auto rows = [](Nf4Kernel kernel, int64_t m) {
    return cuda::nf4_workspace_rows(kernel, Op::none, 4096, 4096, m);
  };
  EXPECT_EQ(rows(Nf4Kernel::wgmma2, 1), 64);
  EXPECT_EQ(rows(Nf4Kernel::wgmma2, 65), 128);
  EXPECT_EQ(rows(Nf4Kernel::wgmma2, 256), 256);
  EXPECT_EQ(rows(Nf4Kernel::wgmma2, 257), 0);
  EXPECT_EQ(rows(Nf4Kernel::wgmma, 64), 0);
  EXPECT_EQ(rows(Nf4Kernel::wgmma3, 64), 0);
}

TEST(Nf4Linear, RejectsWhatDoesNotFit) {
  const Nf4Tensor w = quantize_nf4(tensor(normals(64 * 96, 1), {64, 96}, cpu_f32), 64, true);
  const auto zeros = [](int64_t rows, int64_t cols, DType dtype = DType::f32) {
    return Tensor::zeros({rows, cols}, dtype, Device::cpu());
  };
  const auto forward = [&](const Tensor& y, const Tensor& x, const Tensor& addend = {}) {
    nf4_matmul(y, x, w, Op::transpose, Nf4Kernel::mma, addend);
  };
  EXPECT_ERROR(forward(zeros(5, 64), zeros(5, 64)), "[nf4_matmul] shapes do not fit");
  EXPECT_ERROR(forward(zeros(4, 64), zeros(5, 96)), "[nf4_matmul] shapes do not fit");
  EXPECT_ERROR(forward(zeros(5, 96), zeros(5, 96)), "[nf4_matmul] shapes do not fit");
  EXPECT_ERROR(forward(zeros(5, 64).view({320}), zeros(5, 96)), "needs matrices");
  EXPECT_ERROR(forward(zeros(5, 64), zeros(5, 96, DType::bf16)), "[nf4_matmul] dtypes");
  EXPECT_ERROR(forward(zeros(5, 64), zeros(5, 96), zeros(5, 96)), "[nf4_matmul] cannot add");
}

}  // namespace
}  // namespace qlab::test
