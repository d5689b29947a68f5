#include "core/ops/attention.h"

#include <numeric>

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

using AttentionTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, AttentionTest, all_cases, name);

/// Packed sequences and the inputs of both passes.
struct Problem {
  AttentionShape shape;
  Tensor q, k, v, g, cu_q, cu_k;

  Problem reference() const {
    return {shape,           as_reference(q),    as_reference(k),   as_reference(v),
            as_reference(g), as_reference(cu_q), as_reference(cu_k)};
  }
  Attention forward() const { return attention(q, k, v, cu_q, cu_k, shape); }
  AttentionColumns backward(const Attention& a) const {
    return attention_columns(attention_backward(g, q, k, v, a.o, a.lse, cu_q, cu_k, shape), shape);
  }
  /// Sequence s alone.
  Problem alone(int64_t s) const {
    const std::vector<int32_t> cq = cu_q.to_vector<int32_t>(), ck = cu_k.to_vector<int32_t>();
    const auto offsets = [&](int32_t n) {
      return Tensor::from_vector(std::vector<int32_t>{0, n}, {2}, q.device());
    };
    AttentionShape own = shape;
    own.max_q = cq[s + 1] - cq[s], own.max_k = ck[s + 1] - ck[s];
    return {own,
            q.slice_rows(cq[s], cq[s + 1]),
            k.slice_rows(ck[s], ck[s + 1]),
            v.slice_rows(ck[s], ck[s + 1]),
            g.slice_rows(cq[s], cq[s + 1]),
            offsets(static_cast<int32_t>(own.max_q)),
            offsets(static_cast<int32_t>(own.max_k))};
  }
};

Tensor offsets_of(const std::vector<int32_t>& lengths, const Case& c) {
  std::vector<int32_t> cu{0};
  for (const int32_t n : lengths) cu.push_back(cu.back() + n);
  return tensor_of(cu, c);
}

Problem make_problem(const std::vector<int32_t>& len_q, const std::vector<int32_t>& len_k,
                     int64_t heads, int64_t kv_heads, int64_t dim, const Case& c) {
  const AttentionShape shape{heads, kv_heads, dim, *std::max_element(len_q.begin(), len_q.end()),
                             *std::max_element(len_k.begin(), len_k.end())};
  const int64_t tq = std::accumulate(len_q.begin(), len_q.end(), int64_t{0});
  const int64_t tk = std::accumulate(len_k.begin(), len_k.end(), int64_t{0});
  const auto matrix = [&](int64_t rows, int64_t cols, uint64_t seed) {
    return tensor(normals(rows * cols, seed), {rows, cols}, c);
  };
  return {shape,
          matrix(tq, heads * dim, 11),
          matrix(tk, kv_heads * dim, 12),
          matrix(tk, kv_heads * dim, 13),
          matrix(tq, heads * dim, 14),
          offsets_of(len_q, c),
          offsets_of(len_k, c)};
}
Problem make_problem(const std::vector<int32_t>& lengths, int64_t heads, int64_t kv_heads,
                     int64_t dim, const Case& c) {
  return make_problem(lengths, lengths, heads, kv_heads, dim, c);
}

/// The header's formulas, one query at a time.
Attention plain_attention(const Problem& p) {
  const auto [heads, kv_heads, dim, max_q, max_k] = p.shape;
  const std::vector<double> q = values(p.q), k = values(p.k), v = values(p.v);
  const std::vector<int32_t> cq = p.cu_q.to_vector<int32_t>(), ck = p.cu_k.to_vector<int32_t>();
  std::vector<double> o(q.size(), 0), lse(static_cast<size_t>(p.q.dim(0) * heads));
  for (size_t s = 0; s + 1 < cq.size(); ++s)
    for (int64_t i = cq[s]; i < cq[s + 1]; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t group = h / (heads / kv_heads);
        const int64_t last = i - cq[s] + (ck[s + 1] - ck[s]) - (cq[s + 1] - cq[s]);
        std::vector<double> score;
        double sum = 0;
        for (int64_t j = 0; j <= last; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < dim; ++d)
            dot += q[(i * heads + h) * dim + d] * k[((ck[s] + j) * kv_heads + group) * dim + d];
          score.push_back(std::exp(dot / std::sqrt(static_cast<double>(dim))));
          sum += score.back();
        }
        for (int64_t j = 0; j <= last; ++j)
          for (int64_t d = 0; d < dim; ++d)
            o[(i * heads + h) * dim + d] +=
                score[j] / sum * v[((ck[s] + j) * kv_heads + group) * dim + d];
        lse[i * heads + h] = std::log(sum);
      }
  return {tensor(o, p.q.shape(), cpu_f64), tensor(lse, {p.q.dim(0), heads}, cpu_f64)};
}

// D = 1: scores are q k = [log 1, log 3] for the second query, so P = [1/4, 3/4].
TEST(Attention, Golden) {
  const Tensor q = tensor({5, 1}, {2, 1}, cpu_f64), k = tensor({0, std::log(3.0)}, {2, 1}, cpu_f64);
  const Tensor v = tensor({8, -4}, {2, 1}, cpu_f64), g = tensor({3, 2}, {2, 1}, cpu_f64);
  const Problem p{{1, 1, 1, 2, 2}, q, k, v, g, offsets_of({2}, cpu_f64), offsets_of({2}, cpu_f64)};
  const Attention a = p.forward();
  EXPECT_NEAR(values(a.o)[0], 8, 1e-14);
  EXPECT_NEAR(values(a.o)[1], -1, 1e-14);
  EXPECT_NEAR(values(a.lse)[0], 0, 1e-15);
  EXPECT_NEAR(values(a.lse)[1], std::log(4.0), 1e-15);
  // dP = [16, -8], delta = 2 * -1 = -2, dS = [1/4 * 18, 3/4 * -6] = [4.5, -4.5].
  const auto [dq, dk, dv] = p.backward(a);
  EXPECT_NEAR(values(dq)[0], 0, 1e-14);
  EXPECT_NEAR(values(dq)[1], -4.5 * std::log(3.0), 1e-14);
  EXPECT_NEAR(values(dk)[0], 4.5, 1e-14);
  EXPECT_NEAR(values(dk)[1], -4.5, 1e-14);
  EXPECT_NEAR(values(dv)[0], 3 + 0.5, 1e-14);
  EXPECT_NEAR(values(dv)[1], 1.5, 1e-14);
}

TEST(Attention, MatchesThePlainFormula) {
  for (const int64_t dim : {1, 5, 16, 20, 64})
    for (const auto& [heads, kv_heads] : {std::pair{1, 1}, {4, 2}, {9, 3}}) {
      SCOPED_TRACE(fmt::format("{} heads, {} kv heads of {}", heads, kv_heads, dim));
      const Problem p = make_problem({1, 37, 65, 2}, heads, kv_heads, dim, cpu_f64);
      const Attention a = p.forward(), plain = plain_attention(p);
      expect_close(a.o, plain.o, dim + 65);
      expect_close(a.lse, plain.lse, dim + 65);
    }
  // Fewer queries than keys: the last query sees the last key.
  const Problem p = make_problem({1, 5, 3}, {40, 5, 17}, 2, 1, 8, cpu_f64);
  expect_close(p.forward().o, plain_attention(p).o, 48);
}

TEST(Attention, GradientMatchesFiniteDifferences) {
  for (const Problem& p :
       {make_problem({1, 5}, 4, 2, 3, cpu_f64), make_problem({2, 4}, {4, 2}, 2, 1, 4, cpu_f64)}) {
    const auto [dq, dk, dv] = p.backward(p.forward());
    const auto loss = [&] { return weighted_sum(p.forward().o, p.g); };
    expect_gradient(p.q, dq.clone(), loss);
    expect_gradient(p.k, dk.clone(), loss);
    expect_gradient(p.v, dv.clone(), loss);
  }
}

/// Sums of the absolute terms of o, dq, dk and dv; o and L are those of the pass under test.
struct Magnitudes {
  std::vector<double> o, dq, dk, dv;
};
Magnitudes magnitudes(const Problem& p, const Attention& a) {
  const auto [heads, kv_heads, dim, max_q, max_k] = p.shape;
  const std::vector<double> q = values(p.q), k = values(p.k), v = values(p.v), g = values(p.g);
  const std::vector<double> o = values(a.o), lse = values(a.lse);
  const std::vector<int32_t> cq = p.cu_q.to_vector<int32_t>(), ck = p.cu_k.to_vector<int32_t>();
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  Magnitudes m{std::vector<double>(q.size()), std::vector<double>(q.size()),
               std::vector<double>(k.size()), std::vector<double>(k.size())};
  for (size_t s = 0; s + 1 < cq.size(); ++s)
    for (int64_t i = cq[s]; i < cq[s + 1]; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = (i * heads + h) * dim;
        const int64_t last = i - cq[s + 1] + ck[s + 1];
        double delta = 0;
        for (int64_t d = 0; d < dim; ++d) delta += g[row + d] * o[row + d];
        for (int64_t j = ck[s]; j <= last; ++j) {
          const int64_t col = (j * kv_heads + h / (heads / kv_heads)) * dim;
          double score = 0, change = -delta;
          for (int64_t d = 0; d < dim; ++d) {
            score += q[row + d] * k[col + d];
            change += g[row + d] * v[col + d];
          }
          const double probability = std::exp(score * scale - lse[i * heads + h]);
          const double ds = std::abs(probability * change * scale);
          for (int64_t d = 0; d < dim; ++d) {
            m.o[row + d] += probability * std::abs(v[col + d]);
            m.dq[row + d] += ds * std::abs(k[col + d]);
            m.dk[col + d] += ds * std::abs(q[row + d]);
            m.dv[col + d] += probability * std::abs(g[row + d]);
          }
        }
      }
  return m;
}

/// |a - b| <= u (m + |b|) + 8 sqrt(n) v (1 + m + |b|): the GPU rounds P and dS, one factor of each
/// term, to the type of the result (u); sums of n terms of unit size run in fp32 (v).
void expect_within(const Tensor& actual, const Tensor& reference, const std::vector<double>& m,
                   int64_t n) {
  ASSERT_EQ(actual.shape().str(), reference.shape().str());
  const std::vector<double> a = values(actual), b = values(reference);
  const double u = unit_roundoff(actual.dtype());
  const double v = 8 * std::sqrt(static_cast<double>(n)) *
                   unit_roundoff(actual.dtype() == DType::f64 ? DType::f64 : DType::f32);
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    const double size = m[i] + std::abs(b[i]);
    ASSERT_LE(std::abs(a[i] - b[i]), u * size + v * (1 + size))
        << "element " << i << " of " << actual.str() << ": " << a[i] << ", expected " << b[i];
  }
}

// The backward pass is given the same o and L in both, so that its error is its own.
void expect_matches_reference(const Problem& p) {
  const int64_t n = p.shape.head_dim + p.shape.max_k;
  const Problem p0 = p.reference();
  const Attention a = p.forward(), a0 = p0.forward();
  const Attention given{as_reference(a.o), as_reference(a.lse)};
  const Magnitudes m = magnitudes(p0, given);
  expect_within(a.o, a0.o, m.o, n);
  expect_within(a.lse, a0.lse, std::vector<double>(static_cast<size_t>(a.lse.numel())), n);
  if (p.q.dim(0) != p.k.dim(0)) return;
  const auto [dq, dk, dv] = p.backward(a);
  const auto [dq0, dk0, dv0] = p0.backward(given);
  const int64_t group = p.shape.heads / p.shape.kv_heads;
  expect_within(dq, dq0, m.dq, n);
  expect_within(dk, dk0, m.dk, p.shape.head_dim + p.shape.max_q * group);
  expect_within(dv, dv0, m.dv, p.shape.head_dim + p.shape.max_q * group);
  const auto again = p.backward(p.forward());
  expect_same_bits(dq, again.q);
  expect_same_bits(dk, again.k);
  expect_same_bits(dv, again.v);
}

TEST_P(AttentionTest, MatchesReference) {
  for (const int64_t dim : {16, 64, 80, 96, 128}) {
    SCOPED_TRACE(fmt::format("dimension {}", dim));
    expect_matches_reference(make_problem({1, 37, 70, 2}, 3, 1, dim, GetParam()));
  }
}

TEST_P(AttentionTest, LargeMatchesReferenceForAllGroups) {
  for (const int64_t dim : {16, 64, 80, 96, 128})
    for (const auto& [heads, kv_heads] : {std::pair{1, 1}, {4, 1}, {9, 3}, {8, 1}}) {
      SCOPED_TRACE(fmt::format("{} heads, {} kv heads of {}", heads, kv_heads, dim));
      expect_matches_reference(make_problem({1, 37, 130, 64, 2}, heads, kv_heads, dim, GetParam()));
    }
}

TEST_P(AttentionTest, MatchesReferenceWhereKeysAndQueriesDiffer) {
  for (const int64_t dim : {16, 64, 128}) {
    SCOPED_TRACE(fmt::format("dimension {}", dim));
    expect_matches_reference(make_problem({1, 5, 33}, {40, 5, 97}, 4, 2, dim, GetParam()));
    // Queries before the first key see nothing: o = 0, L = -inf.
    expect_matches_reference(make_problem({1, 150, 33}, {40, 5, 139}, 4, 2, dim, GetParam()));
  }
}

TEST_P(AttentionTest, LargeMatchesReference) {
  expect_matches_reference(make_problem({511, 1, 700}, 9, 3, 64, GetParam()));
}

TEST_P(AttentionTest, LargeMatchesReferenceForManySequences) {
  std::vector<int32_t> lengths;
  for (int32_t i = 0; i < 24; ++i) lengths.push_back(1 + (13 * i) % 301);
  for (const int64_t dim : {64, 128}) {
    SCOPED_TRACE(fmt::format("dimension {}", dim));
    expect_matches_reference(make_problem(lengths, 8, 2, dim, GetParam()));
  }
}

// Lengths at the edges of every tile, of 16 to 128 rows.
TEST_P(AttentionTest, LargeMatchesReferenceAtTheEdgesOfTiles) {
  const std::vector<int32_t> lengths{15,  16,  17,  31,  32,  33,  63,  64,  65, 127,
                                     128, 129, 191, 192, 193, 255, 256, 257, 300};
  for (const int64_t dim : {64, 80, 96, 128}) {
    SCOPED_TRACE(fmt::format("dimension {}", dim));
    expect_matches_reference(make_problem(lengths, 3, 1, dim, GetParam()));
  }
}

TEST_P(AttentionTest, HoldsForLargeScores) {
  for (const int64_t dim : {16, 64}) {
    Problem p = make_problem({50}, 2, 1, dim, GetParam());
    const std::vector<double> large(static_cast<size_t>(50 * 2 * dim), 40);
    p.q = tensor(large, p.q.shape(), GetParam());
    const Attention a = p.forward();
    for (const double o : values(a.o)) ASSERT_TRUE(std::isfinite(o));
    for (const double l : values(a.lse)) ASSERT_TRUE(std::isfinite(l));
    for (const double d : values(p.backward(a).k)) ASSERT_TRUE(std::isfinite(d));
  }
}

// What lets trials train together: a sequence has the same bits alone and in company.
TEST_P(AttentionTest, SequencesAreIndependent) {
  const std::vector<int32_t> lengths{37, 1, 130, 64, 511};
  for (const auto& [heads, kv_heads, dim] : {std::tuple{6, 2, 64}, {4, 1, 128}}) {
    const Problem p = make_problem(lengths, heads, kv_heads, dim, GetParam());
    const Attention a = p.forward();
    const AttentionColumns d = p.backward(a);
    int64_t row = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      SCOPED_TRACE(fmt::format("sequence {} of dimension {}", s, dim));
      const Problem own = p.alone(static_cast<int64_t>(s));
      const auto rows = [&](const Tensor& x) { return x.slice_rows(row, row + lengths[s]); };
      const Attention b = own.forward();
      const AttentionColumns e = own.backward(b);
      expect_same_bits(b.o, rows(a.o));
      expect_same_bits(b.lse, rows(a.lse));
      expect_same_bits(e.q, rows(d.q));
      expect_same_bits(e.k, rows(d.k));
      expect_same_bits(e.v, rows(d.v));
      row += lengths[s];
    }
  }
}

TEST_P(AttentionTest, ANotFiniteSequenceStaysAlone) {
  for (const int64_t dim : {16, 64, 128}) {
    const Problem p = make_problem({20, 40, 33}, 2, 1, dim, GetParam());
    const Attention a = p.forward();
    const AttentionColumns d = p.backward(a);
    for (Tensor Problem::*input : {&Problem::q, &Problem::k, &Problem::v, &Problem::g})
      for (const double bad : {double{INFINITY}, std::nan("")}) {
        Problem sick = p;
        sick.*input = (p.*input).clone();
        for (const int64_t row : {20, 25, 59})
          copy((sick.*input).slice_rows(row, row + 1).slice_cols(3, 4),
               tensor({bad}, {1, 1}, GetParam()));
        const Attention b = sick.forward();
        const AttentionColumns e = sick.backward(b);
        for (const auto& [begin, end] : {std::pair{0, 20}, {60, 93}}) {
          expect_same_bits(a.o.slice_rows(begin, end), b.o.slice_rows(begin, end));
          expect_same_bits(d.q.slice_rows(begin, end), e.q.slice_rows(begin, end));
          expect_same_bits(d.k.slice_rows(begin, end), e.k.slice_rows(begin, end));
          expect_same_bits(d.v.slice_rows(begin, end), e.v.slice_rows(begin, end));
        }
      }
  }
}

// q, k, v inside one projection, results with room behind them: the same bits.
TEST_P(AttentionTest, TakesColumnsOfWiderMatrices) {
  const Problem p = make_problem({37, 1, 130}, 6, 2, 64, GetParam());
  const auto inside = [](const Tensor& wide, const Tensor& x) {
    const Tensor columns = wide.slice_cols(64, 64 + x.dim(1));
    copy(columns, x);
    return columns;
  };
  const auto wide = [&](int64_t cols) {
    return Tensor::pitched(p.q.dim(0), cols + 64, cols + 128, dtype(), device());
  };
  Problem merged = p;
  const Tensor qkv = Tensor::with_tail(p.q.dim(0), 640, 24, dtype(), device());
  const auto [q, k, v] = attention_columns(qkv, p.shape);
  copy(q, p.q);
  copy(k, p.k);
  copy(v, p.v);
  merged.q = q, merged.k = k, merged.v = v;
  merged.g = inside(wide(384), p.g);
  const Attention a = p.forward(), b = attention(q, k, v, p.cu_q, p.cu_k, p.shape, 8);
  EXPECT_EQ(b.o.pitch(), 448);
  expect_same_bits(a.o, b.o);
  expect_same_bits(a.lse, b.lse);
  const AttentionColumns d = p.backward(a), e = merged.backward(b);
  expect_same_bits(d.q, e.q);
  expect_same_bits(d.k, e.k);
  expect_same_bits(d.v, e.v);
  const Tensor roomy =
      attention_backward(p.g, p.q, p.k, p.v, a.o, a.lse, p.cu_q, p.cu_k, p.shape, 8);
  EXPECT_EQ(roomy.pitch(), 704);
  expect_same_bits(attention_columns(roomy, p.shape).k, d.k);
}

TEST(Attention, DoesNotDependOnTheNumberOfThreads) {
  for (const Case& c : {cpu_f32, cpu_bf16, cpu_f16})
    expect_same_for_all_thread_counts([&] {
      const Problem p = make_problem({100, 3, 77}, 6, 3, 32, c);
      const Attention a = p.forward();
      const auto [dq, dk, dv] = p.backward(a);
      return std::vector<Tensor>{a.o, a.lse, dq, dk, dv};
    });
}

TEST(Attention, RejectsWhatDoesNotFit) {
  const Problem p = make_problem({3, 2}, 4, 2, 8, cpu_f32);
  const auto with = [&](auto change) {
    Problem other = p;
    change(other);
    return error_of([&] { other.forward(); });
  };
  const auto has = [](const char* text) { return testing::HasSubstr(text); };
  EXPECT_THAT(with([](Problem& x) { x.shape.kv_heads = 3; }), has("multiple of kv_heads"));
  EXPECT_THAT(with([](Problem& x) { x.shape.head_dim = 4; }), has("[attention] q must be [5, 16]"));
  EXPECT_THAT(with([](Problem& x) { x.k = x.q; }), has("k must be [5, 16]"));
  EXPECT_THAT(with([](Problem& x) { x.v = x.v.slice_rows(0, 4); }), has("v must be [5, 16]"));
  EXPECT_THAT(with([](Problem& x) { x.v = cast(x.v, DType::bf16); }), has("v must be float32"));
  EXPECT_THAT(with([](Problem& x) { x.cu_q = x.q; }), has("cu_q must be int32"));
  EXPECT_THAT(with([](Problem& x) { x.cu_k = x.cu_k.slice_rows(0, 2); }), has("cu_k must be [3]"));
  EXPECT_THAT(with([](Problem& x) { x.shape.max_q = 6; }), has("must not exceed the 5"));
  EXPECT_THAT(with([](Problem& x) { x.shape.max_k = 2; }), has("the longest"));
  EXPECT_THAT(with([](Problem& x) {
                x.cu_q = offsets_of({2, 2}, cpu_f32);
              }),
              has("cover the 5 rows"));
  const Attention a = p.forward();
  const auto backward = [&](const Tensor& g, const Attention& saved) {
    return error_of(
        [&] { attention_backward(g, p.q, p.k, p.v, saved.o, saved.lse, p.cu_q, p.cu_k, p.shape); });
  };
  EXPECT_THAT(error_of([&] {
                AttentionShape shorter = p.shape;
                shorter.max_k = 2;
                attention_backward(p.g, p.q, p.k.slice_rows(0, 4), p.v.slice_rows(0, 4), a.o, a.lse,
                                   p.cu_q, p.cu_k, shorter);
              }),
              has("q and k must have as many rows"));
  EXPECT_THAT(backward(p.k, a), has("[attention_backward] g must be [5, 32]"));
  EXPECT_THAT(backward(p.g, {p.k, a.lse}), has("o must be [5, 32]"));
  EXPECT_THAT(backward(p.g, {a.o, p.k}), has("lse must be [5, 4]"));
  EXPECT_THAT(backward(p.g, {a.o, cast(a.lse, DType::f64)}), has("lse must be float32"));
}

}  // namespace
}  // namespace qlab::test
