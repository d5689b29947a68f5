#include "nn/adapter_products.h"

#include "nn/fold.h"
#include "nn/linear.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

struct Sizes {
  int64_t t, k, r;
  std::vector<int64_t> outs;
  float p;
};

/// The adapters of a segment, or of several, on modules of one input, and what meets them.
struct Problem {
  Tensor x, dy, a, b, s, ds, dx, examples, positions;
  std::vector<LoraModule> modules;
  std::vector<AdapterPart> parts;
  int64_t segments = 1;

  AdapterRows rows() const { return {parts, examples, positions, segments}; }
};

class AdapterProductsTest : public OpTest {
 protected:
  static int64_t width_of(int64_t r) { return (r + fold_step - 1) / fold_step * fold_step; }

  /// [rows, cols] with `tail` more behind each row, after `before` other rows.
  Tensor placed(int64_t rows, int64_t cols, int64_t tail, int64_t before, double scale = 1) {
    const Tensor block = Tensor::with_tail(before + rows, cols, tail, dtype(), device());
    const Tensor y = block.slice_rows(before, before + rows);
    copy(y, random({rows, cols}, scale));
    return y;
  }

  Problem problem(const Sizes& z, int64_t tail = 64, int64_t before = 0, int64_t segments = 1) {
    Problem p;
    p.segments = segments;
    int64_t n = 0;
    for (const int64_t out : z.outs) n += out;
    const int64_t width = width_of(z.r), all = segments * width * std::ssize(z.outs);
    const int64_t rows = segments * z.t;
    p.x = placed(rows, z.k, tail, before);
    p.dy = placed(rows, n, tail, before, 0.1);
    p.dx = placed(rows, z.k, tail, before);
    p.s = placed(rows, all, tail, before);
    p.ds = placed(rows, all, tail, before);
    p.a = Tensor::with_tail(all, z.k, tail, dtype(), device());
    p.b = Tensor::with_tail(n, all, tail, dtype(), device());
    fill_zero(p.a);
    fill_zero(p.b);
    int64_t row = 0, column = 0;
    const DType sums = dtype() == DType::f64 ? DType::f64 : DType::f32;
    for (int64_t i = 0; i < segments * std::ssize(z.outs); ++i) {
      const int64_t out = z.outs[static_cast<size_t>(i) % z.outs.size()];
      LoraModule lora;
      lora.scale = 0.5f / static_cast<float>(1 + column / width / std::ssize(z.outs));
      lora.a_compute = random({z.r, z.k}, 0.1);
      copy(p.a.slice_rows(column, column + z.r), lora.a_compute);
      copy(p.b.slice_rows(row, row + out).slice_cols(column, column + z.r),
           random({out, z.r}, 0.1));
      lora.a = random({z.r, z.k}, Case{device(), sums});
      lora.b = random({out, z.r}, Case{device(), sums});
      lora.da = random({z.r, z.k}, Case{device(), sums}, 3);
      lora.db = random({out, z.r}, Case{device(), sums}, 3);
      p.modules.push_back(lora);
      row = (row + out) % n;
      column += width;
    }
    row = column = 0;
    for (size_t i = 0; i < p.modules.size(); ++i) {
      p.parts.push_back({&p.modules[i], row, column, {17 + i, z.p}});
      row = (row + z.outs[i % z.outs.size()]) % n;
      column += width;
    }
    std::vector<int64_t> examples;
    std::vector<int32_t> positions;
    for (int64_t i = 0; i < rows; ++i) {
      examples.push_back((int64_t{1} << 33) + i / 50);
      positions.push_back(static_cast<int32_t>(i % 50));
    }
    p.examples = tensor_of(examples, GetParam());
    p.positions = tensor_of(positions, GetParam());
    return p;
  }

  /// The same values in f64 on the CPU.
  static Problem reference_of(const Problem& from) {
    Problem p;
    p.x = as_reference(from.x), p.dy = as_reference(from.dy), p.a = as_reference(from.a);
    p.b = as_reference(from.b), p.s = as_reference(from.s), p.ds = as_reference(from.ds);
    p.segments = from.segments;
    p.dx = as_reference(from.dx), p.examples = as_reference(from.examples);
    p.positions = as_reference(from.positions);
    for (LoraModule lora : from.modules) {
      for (Tensor* t : {&lora.a, &lora.b, &lora.da, &lora.db, &lora.a_compute})
        *t = as_reference(*t);
      p.modules.push_back(lora);
    }
    p.parts = from.parts;
    for (size_t i = 0; i < p.parts.size(); ++i) p.parts[i].lora = &p.modules[i];
    return p;
  }

  void expect_formulas(const Sizes& z) {
    SCOPED_TRACE(fmt::format("T {} K {} r {} modules {} p {}", z.t, z.k, z.r, z.outs.size(), z.p));
    const Problem got = problem(z);
    adapter_forward(got.s, got.x, got.a, got.rows());
    const Problem want = reference_of(got);
    adapter_forward(want.s, want.x, want.a, want.rows());
    // Off a GPU's kernels a dropped copy of x is rounded.
    const bool rounded = z.p > 0 && (dtype() == DType::bf16 || dtype() == DType::f16);
    const double terms = std::sqrt(static_cast<double>(z.k));
    for (const AdapterPart& part : got.parts)
      expect_close(used(got.s, part), used(want.s, part), z.k, rounded ? 0.3 * terms : 0);

    adapter_backward(got.ds, got.dy, got.b, got.s, got.x, got.rows());
    const Problem then = reference_of(got);  // with the rounded s, and below the rounded ds
    adapter_backward(then.ds, then.dy, then.b, want.s, then.x, then.rows());
    copy(want.s, as_reference(got.s));
    copy(want.ds, as_reference(got.ds));
    adapter_gradients(want.ds, want.dy, want.s, want.x, want.rows());
    int64_t n = 0;
    for (const int64_t out : z.outs) n = std::max(n, out);
    for (size_t i = 0; i < got.parts.size(); ++i) {
      SCOPED_TRACE("module " + std::to_string(i));
      expect_close(used(got.ds, got.parts[i]), used(then.ds, got.parts[i]), n);
      expect_close(got.modules[i].db, want.modules[i].db, z.t);
      const Tensor& da = got.modules[i].da;
      if (rounded)
        expect_close(cast(da, dtype()), want.modules[i].da, z.t,
                     3 * std::sqrt(static_cast<double>(z.t)));
      else
        expect_close(da, want.modules[i].da, z.t);
    }

    adapter_input_gradient(got.dx, got.ds, got.a, got.rows());
    adapter_input_gradient(want.dx, want.ds, want.a, want.rows());
    // Stored, and rounded, once per module where nothing is dropped; its elements are of unit size.
    expect_close(got.dx, want.dx, z.r, z.p == 0 ? static_cast<double>(z.outs.size()) : 0);
  }

  void expect_alone(const Sizes& z, int64_t segments) {
    SCOPED_TRACE(fmt::format("{} segments of T {} K {} r {} modules {}", segments, z.t, z.k, z.r,
                             z.outs.size()));
    const Problem p = problem(z, 64, 8, segments);
    const auto results = [&] {
      std::vector<Tensor> all{p.s.clone(), p.ds.clone()};
      for (const LoraModule& lora : p.modules) {
        for (const Tensor& t : {lora.da, lora.db}) {
          all.push_back(t.clone());
          copy(t, tensor(normals(t.numel(), 9), t.shape(), {device(), t.dtype()}));
        }
      }
      fill_zero(p.s), fill_zero(p.ds);
      return all;
    };
    results();
    adapter_forward(p.s, p.x, p.a, p.rows());
    adapter_backward(p.ds, p.dy, p.b, p.s, p.x, p.rows());
    const std::vector<Tensor> together = results();
    const int64_t width = p.s.dim(1) / segments, count = p.parts.size() / segments;
    for (int64_t i = 0; i < segments; ++i) {
      std::vector<AdapterPart> parts(p.parts.begin() + i * count,
                                     p.parts.begin() + (i + 1) * count);
      for (AdapterPart& part : parts) part.column -= i * width;
      const AdapterRows rows{parts, {}, {}};
      const auto own = [&](const Tensor& x) { return x.slice_rows(i * z.t, (i + 1) * z.t); };
      const auto own_columns = [&](const Tensor& x) {
        return x.slice_cols(i * width, (i + 1) * width);
      };
      const Tensor s = own_columns(own(p.s)), ds = own_columns(own(p.ds));
      adapter_forward(s, own(p.x), p.a.slice_rows(i * width, (i + 1) * width), rows);
      adapter_backward(ds, own(p.dy), own_columns(p.b), s, own(p.x), rows);
    }
    const std::vector<Tensor> alone = results();
    for (size_t i = 0; i < alone.size(); ++i) expect_same_bits(together[i], alone[i]);
  }

  /// The columns that a rank fills: what stands between them is not everywhere written.
  static Tensor used(const Tensor& s, const AdapterPart& part) { return columns(s, part).clone(); }
};

INSTANTIATE_TEST_SUITE_P(Ops, AdapterProductsTest, all_cases, name);

TEST_P(AdapterProductsTest, MatchTheFormulas) {
  for (const Sizes& z : {Sizes{1, 264, 20, {72}, 0.1f}, Sizes{77, 576, 5, {192}, 0},
                         Sizes{129, 320, 32, {320, 128, 128}, 0.3f}, Sizes{33, 64, 17, {64, 32}, 0},
                         Sizes{40, 72, 80, {64}, 0.1f}, Sizes{40, 70, 8, {63, 9}, 0.1f}})
    expect_formulas(z);
}

TEST_P(AdapterProductsTest, LargeMatchTheFormulas) {
  for (const Sizes& z :
       {Sizes{300, 1544, 16, {576, 200, 192}, 0}, Sizes{300, 1544, 16, {576, 200, 192}, 0.1f},
        Sizes{129, 576, 32, {576, 192, 192}, 0.3f}, Sizes{515, 264, 64, {520}, 0.1f},
        Sizes{200, 512, 40, {1032, 512}, 0.05f}, Sizes{2000, 64, 16, {8200}, 0},
        Sizes{900, 40, 32, {2064, 520}, 0.1f}})
    expect_formulas(z);
}

// Numbers of rows at the edges of every tile and split: of 16, 32, 64 and 128 rows.
TEST_P(AdapterProductsTest, LargeMatchTheFormulasAtTheEdgesOfTiles) {
  for (const int64_t t :
       {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 300})
    for (const float p : {0.0f, 0.1f}) {
      expect_formulas({t, 264, 16, {136, 72}, p});
      expect_formulas({t, 72, 32, {520}, p});
    }
}

// Whatever lies before and behind the rows, and however wide the others make them.
TEST_P(AdapterProductsTest, BitsDoNotDependOnTheNeighbours) {
  if (device().is_cuda() && dtype() == DType::f32) GTEST_SKIP() << "the library's choice";
  for (const Sizes& z :
       {Sizes{300, 1544, 16, {576, 200, 192}, 0.1f}, Sizes{515, 264, 32, {520}, 0}}) {
    std::vector<Tensor> alone;
    for (const auto& [tail, before] : {std::pair<int64_t, int64_t>{64, 0}, {1024, 24}}) {
      Problem p = problem(z, tail, before);
      if (!alone.empty()) {
        copy(p.x, alone[0]);
        copy(p.dy, alone[1]);
        copy(p.dx, alone[2]);
        copy(p.a, alone[3]);
        copy(p.b, alone[4]);
        for (size_t i = 0; i < p.parts.size(); ++i) {
          const int64_t column = p.parts[i].column;
          copy(p.modules[i].a_compute, p.a.slice_rows(column, column + z.r));
        }
      } else {
        for (const Tensor& t : {p.x, p.dy, p.dx, p.a, p.b}) alone.push_back(t.clone());
      }
      for (const LoraModule& lora : p.modules) fill_zero(lora.da), fill_zero(lora.db);
      fill_zero(p.s);
      adapter_forward(p.s, p.x, p.a, p.rows());
      adapter_backward(p.ds, p.dy, p.b, p.s, p.x, p.rows());
      if (z.p > 0) adapter_input_gradient(p.dx, p.ds, p.a, p.rows());
      std::vector<Tensor> results{p.s.clone(), p.ds.clone(), p.dx.clone()};
      for (const LoraModule& lora : p.modules) {
        results.push_back(lora.da.clone());
        results.push_back(lora.db.clone());
      }
      if (alone.size() == 5) {
        alone.insert(alone.end(), results.begin(), results.end());
        continue;
      }
      for (size_t i = 0; i < results.size(); ++i) expect_same_bits(results[i], alone[5 + i]);
    }
  }
}

// Segments that compute together have the bits of each alone, and write their own blocks only.
TEST_P(AdapterProductsTest, SegmentsTogetherAreThoseAlone) {
  if (device().is_cuda() && dtype() == DType::f32) GTEST_SKIP() << "the library's choice";
  for (const Sizes& z : {Sizes{77, 264, 5, {192}, 0}, Sizes{40, 320, 16, {320, 128, 128}, 0},
                         Sizes{33, 64, 20, {64, 32}, 0}, Sizes{40, 72, 80, {64}, 0},
                         Sizes{1, 70, 8, {63, 9}, 0}, Sizes{128, 1544, 16, {576, 200}, 0}})
    for (const int64_t segments : {2, 3, max_segments}) expect_alone(z, segments);
}

TEST_P(AdapterProductsTest, LargeSegmentsTogetherAreThoseAlone) {
  if (!device().is_cuda() || dtype() != DType::bf16) GTEST_SKIP() << "for a GPU's kernels";
  for (const Sizes& z :
       {Sizes{512, 4096, 16, {4096, 1024, 1024}, 0}, Sizes{512, 4096, 8, {4096}, 0},
        Sizes{512, 4096, 16, {14336, 14336}, 0}, Sizes{512, 14336, 16, {4096}, 0},
        Sizes{300, 4096, 64, {4096}, 0}, Sizes{2048, 4096, 32, {4096, 1024, 1024}, 0}})
    for (const int64_t segments : {3, max_segments}) expect_alone(z, segments);
}

// A group whose weight is held expanded keeps the adapters of its latest forward pass there; an
// earlier one's backward pass must not meet them.
TEST_P(AdapterProductsTest, HeldWeightsMeetTheAdaptersOfTheirPass) {
  if (dtype() == DType::f64) GTEST_SKIP() << "weights are held in the compute dtype";
  const std::string name = "model.layers.0.mlp.down_proj";
  const int64_t n = 48, k = 64, t = 30, width = 16;
  LinearGroup group;
  group.folded = true;
  group.members.resize(1);
  group.members[0].name = name;
  group.members[0].weight = Weight::from_dense(
      random({n, k}, 0.1),
      WeightSpec{dtype() == DType::f32 ? WeightFormat::fp32 : WeightFormat::bf16});
  group.resident = Tensor::with_tail(n + width, k, width, dtype(), device()).widened(k + width);
  group.members[0].weight.expand(group.resident.slice_rows(0, n).slice_cols(0, k));
  const Tensor input = random({t, k}), gradient = random({t, n});
  const auto make = [&](uint64_t seed) {
    LoraSpec spec;
    spec.r = 8;
    auto adapter = std::make_unique<Adapter>(spec, std::vector{Adapter::Shape{0, name, k, n}}, seed,
                                             4, dtype(), device());
    copy(adapter->module(name).b, random_f32({n, spec.r}, 0.1));
    adapter->refresh();
    return adapter;
  };
  const auto one = make(1), two = make(2);
  struct Pass {
    Batch batch;
    Tape tape;
    Variable x, y;
  };
  const auto forward = [&](const Adapter& adapter) {
    auto pass = std::make_unique<Pass>();
    pass->batch.segments = {{.end = t, .adapter = &adapter}};
    pass->x = pass->tape.input(input, true);
    pass->y = linear(pass->tape, pass->x, group, pass->batch);
    return pass;
  };
  const auto backward = [&](Pass& pass) {
    pass.tape.backward(pass.y, gradient.clone());
    return pass.tape.gradient(pass.x).clone();
  };
  const auto first = forward(*one);
  forward(*two);
  const Tensor late = backward(*first), late_da = one->module(name).da.clone();
  fill_zero(one->gradients());
  const auto again = forward(*one);
  const Tensor at_once = backward(*again);
  expect_same_bits(late, at_once);
  expect_same_bits(late_da, one->module(name).da);
}

TEST(AdapterProducts, RejectWhatDoesNotFit) {
  const auto make = [](int64_t rows, int64_t cols) {
    return tensor(normals(rows * cols, 1), {rows, cols}, cpu_f32);
  };
  LoraModule lora;
  lora.a = make(4, 8), lora.b = make(6, 4);
  const AdapterPart part{&lora, 0, 0, {}};
  const AdapterRows rows{std::span(&part, 1), {}, {}};
  EXPECT_ERROR(adapter_forward(make(5, 16), make(5, 8), make(12, 8), rows), "s must be");
  EXPECT_ERROR(adapter_forward(make(5, 16), make(5, 8), make(16, 7), rows), "a must be");
  EXPECT_ERROR(adapter_backward(make(5, 8), make(5, 6), make(6, 16), make(5, 16), make(5, 8), rows),
               "ds must be");
  const std::vector<AdapterPart> three(3, part);
  EXPECT_ERROR(adapter_forward(make(5, 48), make(5, 8), make(48, 8), {three, {}, {}, 3}),
               "3 segments of 3 parts");
  EXPECT_ERROR(adapter_forward(make(6, 32), make(6, 8), make(32, 8), {three, {}, {}, 2}),
               "2 segments of 3 parts");
}

}  // namespace
}  // namespace qlab::test
