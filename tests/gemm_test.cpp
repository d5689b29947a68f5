#include "core/ops/gemm.h"

#include <algorithm>
#include <optional>

#include "core/ops/gemm_tiling.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using GemmTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, GemmTest, all_cases, name);

struct Sizes {
  int64_t m, n, k;
};
constexpr std::pair<Op, Op> all_ops[] = {{Op::none, Op::none},
                                         {Op::none, Op::transpose},
                                         {Op::transpose, Op::none},
                                         {Op::transpose, Op::transpose}};

Shape stored(Op op, int64_t rows, int64_t cols) {
  return op == Op::none ? Shape{rows, cols} : Shape{cols, rows};
}

/// The definition, in f64.
Tensor plain_gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, double alpha,
                  double beta) {
  const std::vector<double> x = values(a), y = values(b);
  std::vector<double> out = values(c);
  const int64_t m = c.dim(0), n = c.dim(1), k = a.dim(op_a == Op::none ? 1 : 0);
  const int64_t a_row = op_a == Op::none ? k : 1, a_col = op_a == Op::none ? 1 : m;
  const int64_t b_row = op_b == Op::none ? n : 1, b_col = op_b == Op::none ? 1 : k;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += x[i * a_row + p * a_col] * y[p * b_row + j * b_col];
      out[i * n + j] = alpha * sum + (beta == 0 ? 0 : beta * out[i * n + j]);
    }
  return tensor(out, c.shape(), cpu_f64);
}

TEST_P(GemmTest, Golden) {
  const Tensor a = tensor({1, 2, 3, 4, 5, 6}, {2, 3}, GetParam());
  const Tensor b = tensor({1, -1, 0, 2, 3, 0.5}, {3, 2}, GetParam());
  const Tensor c = tensor({1, 2, 3, 4}, {2, 2}, GetParam());
  gemm(c, a, Op::none, b, Op::none, 2, -1);
  EXPECT_EQ(values(c), (std::vector<double>{19, 7, 41, 14}));
  EXPECT_EQ(values(matmul_nt(a, tensor({1, 0, -1, 2, 2, 2}, {2, 3}, GetParam()))),
            (std::vector<double>{-2, 12, -2, 30}));
  EXPECT_EQ(values(matmul_nn(a, b)), (std::vector<double>{10, 4.5, 22, 9}));
}

TEST_P(GemmTest, MatchesTheDefinition) {
  const Sizes sizes[] = {{1, 1, 1},    {3, 5, 7},     {17, 33, 65},  {64, 64, 64},
                         {1, 96, 200}, {130, 1, 257}, {96, 130, 40}, {300, 16, 576}};
  for (const auto& [m, n, k] : sizes)
    for (const auto& [op_a, op_b] : all_ops) {
      SCOPED_TRACE(fmt::format("M {} N {} K {}, ops {} {}", m, n, k, static_cast<int>(op_a),
                               static_cast<int>(op_b)));
      const Tensor a = random(stored(op_a, m, k)), b = random(stored(op_b, k, n));
      const Tensor c = random({m, n}), again = c.clone();
      const Tensor expected = plain_gemm(c, a, op_a, b, op_b, 0.75, -0.5);
      gemm(c, a, op_a, b, op_b, 0.75f, -0.5f);
      const double scale = std::sqrt(static_cast<double>(k));
      expect_close(c, expected, k, scale);
      gemm(again, a, op_a, b, op_b, 0.75f, -0.5f);
      expect_same_bits(c, again);
    }
}

TEST_P(GemmTest, AccumulatesIntoFloat32) {
  if (dtype() == DType::f64) GTEST_SKIP() << "f64 products stay f64";
  const Tensor a = random({70, 48}), b = random({70, 33}), c = random_f32({48, 33});
  const Tensor expected = plain_gemm(c, a, Op::transpose, b, Op::none, 1, 1);
  gemm(c, a, Op::transpose, b, Op::none, 1, 1);
  expect_close(c, expected, 70, std::sqrt(70.0));
}

TEST_P(GemmTest, IgnoresWhatWasInCWhenBetaIsZero) {
  const Tensor a = random({5, 40}), b = random({24, 40});
  const Tensor c = tensor(std::vector<double>(5 * 24, NAN), {5, 24}, GetParam());
  gemm(c, a, Op::none, b, Op::transpose);
  expect_same_bits(c, matmul_nt(a, b));
}

TEST_P(GemmTest, HonoursPitches) {
  for (const auto& [op_a, op_b] : all_ops) {
    SCOPED_TRACE(fmt::format("ops {} {}", static_cast<int>(op_a), static_cast<int>(op_b)));
    const Shape sa = stored(op_a, 37, 48), sb = stored(op_b, 48, 56);
    const Tensor wide_a = random({sa[0], sa[1] + 24}), wide_b = random({sb[0], sb[1] + 16});
    const Tensor wide_c = random({37, 56 + 32}), guard = wide_c.clone();
    const Tensor a = wide_a.slice_cols(16, 16 + sa[1]), b = wide_b.slice_cols(8, 8 + sb[1]);
    const Tensor c = wide_c.slice_cols(16, 72);
    const Tensor expected = plain_gemm(c.clone(), a.clone(), op_a, b.clone(), op_b, 1, 1);
    gemm(c, a, op_a, b, op_b, 1, 1);
    expect_close(c, expected, 48, std::sqrt(48.0));
    expect_same_bits(wide_c.slice_cols(0, 16), guard.slice_cols(0, 16));
    expect_same_bits(wide_c.slice_cols(72, 88), guard.slice_cols(72, 88));
  }
}

TEST_P(GemmTest, LargeMatchesTheDefinition) {
  const Tensor x = random({257, 1536}), w = random({576, 1536}, 0.05);
  const Tensor y = matmul_nt(x, w);
  expect_close(y, plain_gemm(y, x, Op::none, w, Op::transpose, 1, 0), 1536);
}

// One chain of 49,152 would be off by about sqrt(K / 2) half-ulps of its partial sums, 3.7e-6.
TEST_P(GemmTest, SumsLongChainsInParts) {
  if (dtype() != DType::f32) GTEST_SKIP() << "a property of fp32 products";
  const int64_t k = 49152;
  const Tensor a = random({16, k}), b = random({24, k});
  const Tensor y = matmul_nt(a, b);
  const std::vector<double> got = values(y),
                            expected = values(plain_gemm(y, a, Op::none, b, Op::transpose, 1, 0));
  double error = 0, square = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    square += expected[i] * expected[i];
  }
  EXPECT_LT(std::sqrt(error / square), 1e-6);
}

// What lets trials train together: a row's bits depend on that row alone.
TEST(Gemm, RowsAreIndependentOfTheirNumberAndPlace) {
  for (const Case& c : {cpu_f32, cpu_bf16, cpu_f16})
    for (const int64_t n : {8, 70}) {
      const int64_t k = 83, total = 600;
      const Tensor x = tensor(normals(total * k, 1), {total, k}, c);
      const Tensor w = tensor(normals(n * k, 2), {n, k}, c),
                   v = tensor(normals(n * k, 3), {k, n}, c);
      const Tensor y = matmul_nt(x, w), z = matmul_nn(x, v);
      const std::vector<int32_t> offset = integers(301, total - 300, 4);
      for (int64_t m = 1; m <= 300; ++m) {
        const int64_t begin = offset[m], end = begin + m;
        const Tensor part = x.slice_rows(begin, end);
        ASSERT_TRUE(bytes_of(matmul_nt(part, w)) == bytes_of(y.slice_rows(begin, end)))
            << m << " rows from " << begin << ", N " << n;
        ASSERT_TRUE(bytes_of(matmul_nn(part, v)) == bytes_of(z.slice_rows(begin, end)))
            << m << " rows from " << begin << ", N " << n;
      }
    }
}

/// The same in 16 bits on a GPU, for the products with a base: what they share with the CPU's is
/// that no sum over K is cut into parts, unless the library offers nothing else (cuda/gemm.cu).
struct BaseProduct {
  const char* name;
  int64_t n, k;
  bool residual;  // added on the way
};
constexpr BaseProduct base_products[] = {
    {"8B q, k, v", 6144, 4096, false},      {"8B o", 4096, 4096, true},
    {"8B gate, up", 28672, 4096, false},    {"8B down", 4096, 14336, true},
    {"SmolLM2 q, k, v", 960, 576, false},   {"SmolLM2 o", 576, 576, true},
    {"SmolLM2 gate, up", 3072, 576, false}, {"SmolLM2 down", 576, 1536, true}};
/// What is not promised, with the reason.
struct Exception {
  int64_t rows;
  const char* reason;
};
constexpr Exception exceptions[] = {
    {1,
     "the library may take a matrix-vector kernel; a single token has no loss and trains nothing"},
};

/// [rows, cols] at the pitch of tensors with room for adapters, of standard normals that repeat.
Tensor repeated_normals(int64_t rows, int64_t cols, const Tensor& pool) {
  const int64_t pitch = (cols + 63) / 64 * 64;
  const Tensor block = Tensor::empty({rows * pitch}, pool.dtype(), pool.device());
  for (int64_t begin = 0; begin < block.numel(); begin += pool.numel()) {
    const int64_t count = std::min(pool.numel(), block.numel() - begin);
    copy(block.slice_rows(begin, begin + count), pool.slice_rows(0, count));
  }
  return block.view({rows, pitch}).slice_cols(0, cols);
}

TEST_P(GemmTest, LargeRowsOfBaseProductsAreIndependent) {
  if (!device().is_cuda() || dtype() == DType::f32) GTEST_SKIP() << "of 16 bits on a GPU";
  constexpr int64_t most = 8192, compared = 32;
  constexpr int64_t odd = 4194301;  // prime, so that rows do not repeat
  const Tensor pool = random({odd});
  std::string differ;
  for (const BaseProduct& p : base_products)
    for (const int64_t width : {0, 16, 64, 512})
      for (const bool forward : {true, false}) {
        const int64_t in = (forward ? p.k : p.n) + width, out = forward ? p.n : p.k;
        const Tensor x = repeated_normals(most, in, pool);
        // Of the block that both directions share (nn/fold.h), the part that this one reads.
        const Tensor w = repeated_normals(forward ? out : in, p.k + width, pool)
                             .slice_cols(0, forward ? in : out);
        const bool added = forward && p.residual;
        const Tensor residual = added ? repeated_normals(most, out, pool) : Tensor();
        const auto product = [&](int64_t begin, int64_t end) {
          const Tensor y =
              Tensor::with_tail(end - begin, out, forward && !added ? width : 0, dtype(), device());
          gemm(y, x.slice_rows(begin, end), Op::none, w, forward ? Op::transpose : Op::none, 1.0f,
               added ? 1.0f : 0.0f, added ? residual.slice_rows(begin, end) : Tensor());
          return y;
        };
        const Tensor all = product(0, most);
        for (const int64_t m : {1, 2, 15, 16, 17, 64, 100, 128, 255, 1024, 2048}) {
          if (std::any_of(std::begin(exceptions), std::end(exceptions),
                          [&](const Exception& e) { return e.rows == m; }))
            continue;
          const int64_t begin = most - m, first = std::min(compared, m);
          const Tensor y = product(begin, most), same = all.slice_rows(begin, most);
          const auto equal = [&](int64_t from, int64_t to) {
            return bytes_of(y.slice_rows(from, to)) == bytes_of(same.slice_rows(from, to));
          };
          if (!equal(0, first) || !equal(m - first, m))
            differ += fmt::format("\n  {} (N {}, K {}) + {} columns, {}, {} rows", p.name, p.n, p.k,
                                  width, forward ? "forward" : "dx", m);
        }
      }
  EXPECT_EQ(differ, "") << "rows differ from those of a product of " << most << " rows";
}

/// x [m, in] times a base's block, whose rows have room for adapters. The first and the last rows.
std::string some_bits(const BaseProduct& p, int64_t m, bool forward, const Tensor& pool,
                      std::optional<int> proposal) {
  constexpr int64_t adapter = 16, compared = 256;
  const int64_t in = (forward ? p.k : p.n) + adapter, out = forward ? p.n : p.k;
  const Tensor x = repeated_normals(m, in, pool);
  const Tensor w =
      repeated_normals(forward ? out : in, p.k + adapter, pool).slice_cols(0, forward ? in : out);
  const Tensor y = Tensor::with_tail(m, out, forward ? adapter : 0, x.dtype(), x.device());
  std::optional<GemmProposal> asked;
  if (proposal) asked.emplace(*proposal);
  gemm(y, x, Op::none, w, forward ? Op::transpose : Op::none);
  const auto rows = [&](int64_t begin) {
    const auto bytes = bytes_of(y.slice_rows(begin, std::min(begin + compared, m)));
    return std::string(bytes.begin(), bytes.end());
  };
  return rows(0) + rows(std::max<int64_t>(0, m - compared));
}

// Whichever kernel is the fastest may be taken, since none changes a bit: all that `make tune` can
// choose among.
TEST_P(GemmTest, LargeProposalsHaveTheBitsOfTheLibrarysChoice) {
  if (!device().is_cuda() || dtype() != DType::bf16) GTEST_SKIP() << "bf16 on a GPU";
  const Tensor pool = random({4194301});
  const Tensor workspace =
      Tensor::empty({cuda::gemm_workspace(2048, 1, 1, dtype())}, DType::u8, device());
  std::vector<BaseProduct> products(std::begin(base_products), std::end(base_products));
  products.push_back({"8B gate", 14336, 4096, false});
  for (const BaseProduct& p : products)
    for (const bool forward : {true, false})
      for (const int64_t m : {2048, 4096, 8192, 16384}) {
        const std::string want = some_bits(p, m, forward, pool, 0);
        const Tensor x = Tensor::empty({m, (forward ? p.k : p.n) + 16}, dtype(), device());
        const Tensor w = forward ? Tensor::empty({p.n, p.k + 16}, dtype(), device())
                                 : Tensor::empty({p.n + 16, p.k}, dtype(), device());
        const Tensor y = Tensor::empty({m, forward ? p.n : p.k}, dtype(), device());
        const int count = static_cast<int>(
            cuda::gemm_proposals(y, x, w, forward ? Op::transpose : Op::none, workspace).size());
        EXPECT_GE(count, 1);
        for (int proposal = 1; proposal < count; ++proposal)
          EXPECT_TRUE(some_bits(p, m, forward, pool, proposal) == want)
              << p.name << (forward ? ", forward, " : ", dx, ") << m << " rows, proposal "
              << proposal;
      }
}

TEST_P(GemmTest, LargeMeasuredTilingsHaveTheBitsOfTheLibrarysChoice) {
  if (!device().is_cuda() || dtype() != DType::bf16) GTEST_SKIP() << "bf16 on a GPU";
  const std::string gpu = cuda::device_name(device().index);
  const Tensor pool = random({4194301});
  int compared = 0;
  for (const GemmLine& line : measured_gemm_lines()) {
    if (line.gpu != gpu || line.n * line.k > (int64_t{1} << 27)) continue;
    const BaseProduct p{"a line", line.n, line.k, false};
    const bool forward = line.op == Op::transpose;
    ++compared;
    EXPECT_TRUE(some_bits(p, line.rows, forward, pool, {}) ==
                some_bits(p, line.rows, forward, pool, 0))
        << line.n << " x " << line.k << (forward ? ", forward, " : ", dx, ") << line.rows
        << " rows";
  }
  if (compared == 0) GTEST_SKIP() << "no product was measured on " << gpu;
}

TEST(Gemm, AProposalEndsWithItsScope) {
  EXPECT_EQ(GemmProposal::current(), -1);
  {
    const GemmProposal outer(2);
    {
      const GemmProposal inner(0);
      EXPECT_EQ(GemmProposal::current(), 0);
    }
    EXPECT_EQ(GemmProposal::current(), 2);
  }
  EXPECT_EQ(GemmProposal::current(), -1);
}

TEST(GemmCuda, AProposalThatIsNotThereIsRefused) {
  if (cuda::device_count() == 0) GTEST_SKIP() << "needs a GPU";
  const Tensor x = Tensor::zeros({64, 64}, DType::f32, Device::cuda());
  const GemmProposal far(1000);
  EXPECT_THAT([&] { matmul_nt(x, x); },
              testing::ThrowsMessage<Error>(testing::HasSubstr("none of number 1000")));
}

// Products side by side have the bits of each alone, whether their matrices lie at equal distances,
// as blocks of a wide one do, or anywhere.
TEST_P(GemmTest, EachIsAProductAlone) {
  if (device().is_cuda() && dtype() == DType::f32) GTEST_SKIP() << "the library's choice";
  std::vector<Sizes> sizes = {{1, 16, 64}, {77, 16, 200}, {48, 130, 40}, {16, 8, 8}};
  if (device().is_cuda())
    sizes.insert(sizes.end(), {{512, 48, 4096}, {16, 4096, 512}, {512, 16, 14336}});
  constexpr int64_t count = 5;
  for (const auto& [m, n, k] : sizes)
    for (const auto& [op_a, op_b] : all_ops)
      for (const SplitK split_k : {SplitK::no, SplitK::allowed})
        for (const bool even : {true, false}) {
          SCOPED_TRACE(fmt::format("M {} N {} K {}, ops {} {}, {}", m, n, k, static_cast<int>(op_a),
                                   static_cast<int>(op_b), even));
          const Shape a_shape = stored(op_a, m, k), b_shape = stored(op_b, k, n);
          const Tensor a = random({count * a_shape[0], a_shape[1]});
          const Tensor b = random({b_shape[0], count * b_shape[1]});
          const Tensor c = Tensor::zeros({count * m, count * n}, dtype(), device());
          std::vector<Factors> products;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t at = even ? i : i * i % count;  // 0, 1, 4, 4, 1
            products.push_back({c.slice_rows(i * m, (i + 1) * m).slice_cols(i * n, (i + 1) * n),
                                a.slice_rows(at * a_shape[0], (at + 1) * a_shape[0]),
                                b.slice_cols(at * b_shape[1], (at + 1) * b_shape[1])});
          }
          const int64_t before = gemm_count();
          gemm_each(products, op_a, op_b, split_k);
          EXPECT_EQ(gemm_count(), before + count);
          const Tensor alone = Tensor::zeros(c.shape(), dtype(), device());
          for (int64_t i = 0; i < count; ++i) {
            const Factors& p = products[static_cast<size_t>(i)];
            gemm(alone.slice_rows(i * m, (i + 1) * m).slice_cols(i * n, (i + 1) * n), p.a, op_a,
                 p.b, op_b, 1.0f, 0.0f, {}, split_k);
          }
          expect_same_bits(c, alone);
        }
}

// And an adapter's columns do not depend on the adapters beside it.
TEST(Gemm, ColumnsAreIndependentOfTheirNumber) {
  const Tensor x = tensor(normals(50 * 90, 1), {50, 90}, cpu_f32);
  const Tensor w = tensor(normals(64 * 90, 2), {64, 90}, cpu_f32);
  const Tensor y = matmul_nt(x, w);
  for (const auto& [begin, end] : {std::pair{0, 1}, {3, 20}, {16, 32}, {40, 64}})
    expect_same_bits(matmul_nt(x, w.slice_rows(begin, end)), y.slice_cols(begin, end));
}

TEST(Gemm, DoesNotDependOnTheNumberOfThreads) {
  for (const Case& c : {cpu_f32, cpu_bf16, cpu_f16})
    expect_same_for_all_thread_counts([&] {
      const Tensor x = tensor(normals(130 * 200, 1), {130, 200}, c);
      const Tensor w = tensor(normals(150 * 200, 2), {150, 200}, c);
      const Tensor a = tensor(normals(16 * 200, 3), {16, 200}, c);
      const Tensor dw = Tensor::empty({200, 200}, DType::f32, Device::cpu());
      gemm(dw, x, Op::transpose, x, Op::none);
      return std::vector<Tensor>{matmul_nt(x, w), matmul_nt(x, a), dw};
    });
}

TEST(Gemm, CountsProducts) {
  const Tensor x = tensor(normals(4, 1), {2, 2}, cpu_f32);
  const int64_t before = gemm_count();
  matmul_nt(x, x);
  matmul_nn(x, x);
  EXPECT_EQ(gemm_count(), before + 2);
}

TEST(Gemm, RejectsWhatDoesNotFit) {
  const Tensor a = tensor(normals(6, 1), {2, 3}, cpu_f32),
               c = tensor(normals(4, 1), {2, 2}, cpu_f32);
  EXPECT_ERROR(gemm(c, a, Op::none, a, Op::none), "[gemm] shapes do not fit");
  EXPECT_ERROR(gemm(a, a, Op::none, a, Op::transpose), "[gemm] shapes do not fit");
  EXPECT_ERROR(gemm(c, a, Op::none, cast(a, DType::bf16), Op::transpose), "[gemm] dtypes");
  EXPECT_ERROR(gemm(cast(c, DType::bf16), a, Op::none, a, Op::transpose), "[gemm] dtypes");
  EXPECT_ERROR(gemm(c, a.view({6}), Op::none, a, Op::transpose), "needs matrices");
  EXPECT_ERROR(gemm_each(std::vector<Factors>{{c, a, a}, {c, a, c}}, Op::none, Op::transpose),
               "[gemm] shapes do not fit");
}

}  // namespace
}  // namespace qlab::test
