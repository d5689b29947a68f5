#include "autograd/tape.h"

#include <map>

#include "autograd/functions.h"
#include "core/ops/add.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

constexpr int64_t rows = 6, heads = 2, head_dim = 8, width = heads * head_dim;

class TapeTest : public testing::Test {
 protected:
  static Tensor random(const Shape& shape, uint64_t seed, const Case& c = cpu_f64) {
    return tensor(normals(shape.numel(), seed), shape, c);
  }

  /// a | b
  static Variable joined(Tape& tape, const Variable& a, const Variable& b) {
    const int64_t left = a.value.dim(1), cols = left + b.value.dim(1);
    const Tensor both = Tensor::empty({a.value.dim(0), cols}, DType::f64, Device::cpu());
    copy(both.slice_cols(0, left), a.value);
    copy(both.slice_cols(left, cols), b.value);
    return tape.record("joined", both, {a, b}, {}, [=](const Tensor& g, const Node&) {
      return std::vector<Tensor>{g.slice_cols(0, left).clone(), g.slice_cols(left, cols).clone()};
    });
  }

  // Every operation of the tape, with x entering twice: as the residual and as the norm's input.
  Variable layer(Tape& tape, const Variable& x) const {
    const Variable n = rms_norm(tape, x, norm_, 1e-5f);
    const Variable qkv =
        rope(tape, joined(tape, joined(tape, n, n), n), 2 * width, positions_, tables_, head_dim);
    const Variable mixed = attention(tape, qkv, cu_, {heads, heads, head_dim, rows, rows});
    const Variable h = add(tape, x, mixed);
    return add(tape, h, swiglu(tape, joined(tape, h, n)));
  }

  struct Result {
    Tensor y, dx;
    std::map<std::string, int64_t> held;  // slots between forward and backward: name -> bytes
  };
  // Two layers, then a choice of rows.
  Result run(bool recompute, const Tape::Policy& policy = {}) const {
    Tape tape;
    if (policy) tape.set_policy(policy);
    const Variable x = tape.input(x_, true);
    Variable h = x;
    for (int l = 0; l < 2; ++l) {
      const auto forward = [&](const Variable& in) { return layer(tape, in); };
      h = recompute ? tape.recompute(forward, h) : forward(h);
    }
    const Variable y = gather_rows(tape, h, index_);
    Result result{y.value, {}, {}};
    for (const auto& [name, bytes] : tape.slots()) result.held[std::string(name)] += bytes;
    tape.backward(y, seed_);
    EXPECT_TRUE(tape.slots().empty());
    result.dx = tape.gradient(x);
    return result;
  }

  Tensor x_ = random({rows, width}, 1);
  Tensor norm_ = random({width}, 2, cpu_f32);
  Tensor seed_ = random({3, width}, 3);
  Tensor index_ = tensor_of<int32_t>({4, 0, 5}, cpu_f64);
  Tensor positions_ = tensor_of<int32_t>({0, 1, 2, 3, 0, 1}, cpu_f64);
  Tensor cu_ = tensor_of<int32_t>({0, 4, 6}, cpu_f64);
  RopeTables tables_ = rope_tables(8, head_dim, 10000, std::nullopt, {}, Device::cpu());
};

TEST_F(TapeTest, GradientOfTheWholeIsThatOfDifferences) {
  const Tensor gradient = run(false).dx.clone();
  expect_gradient(x_, gradient, [&] { return weighted_sum(run(false).y, seed_); });
}

TEST_F(TapeTest, AnInputUsedTwiceGetsTheSum) {
  Tape tape;
  const Variable x = tape.input(x_, true), b = tape.input(random({rows, width}, 7), true);
  const Variable once = add(tape, x, b), twice = add(tape, once, x), thrice = add(tape, twice, x);
  const Tensor g = random({rows, width}, 8), before = g.clone();
  tape.backward(thrice, g);
  expect_same_bits(tape.gradient(x), add(add(g, g), g));
  expect_same_bits(tape.gradient(b), g);
  expect_same_bits(g, before);  // sums are never formed inside a gradient that others hold
}

TEST_F(TapeTest, AGradientThatLeavesOneNodeTwiceIsNotSummedInPlace) {
  Tape tape;
  const Variable x = tape.input(x_, true);
  const Variable doubled = add(tape, x, x), fourfold = add(tape, doubled, doubled);
  const Tensor g = random({rows, width}, 9);
  tape.backward(fourfold, g.clone());
  expect_same_bits(tape.gradient(x), add(add(g, g), add(g, g)));
}

TEST_F(TapeTest, RecomputeKeepsNothingAndChangesNoBit) {
  const Result kept = run(false), again = run(true);
  EXPECT_FALSE(kept.held.empty());
  EXPECT_TRUE(again.held.empty());
  expect_same_bits(again.y, kept.y);
  expect_same_bits(again.dx, kept.dx);
}

TEST_F(TapeTest, APolicyKeepsTheSlotsItNames) {
  const Result kept = run(false), none = run(true);
  for (const std::string prefix : {"attention.", "swiglu.gate_up", "rms_norm.r"}) {
    const Result some = run(true, [&](std::string_view slot) {
      return slot.starts_with(prefix) ? SlotPolicy::keep : SlotPolicy::recompute;
    });
    EXPECT_FALSE(some.held.empty());
    for (const auto& [name, bytes] : some.held) {
      EXPECT_TRUE(name.starts_with(prefix)) << name;
      EXPECT_EQ(bytes, kept.held.at(name));
    }
    expect_same_bits(some.dx, kept.dx);
  }
}

TEST_F(TapeTest, SlotsAreListedWithNamesAndBytes) {
  constexpr int64_t block = rows * width * 8, layers = 2;
  const std::map<std::string, int64_t> expected = {{"rms_norm.x", layers * block},
                                                   {"rms_norm.r", layers * rows * 8},
                                                   {"attention.qkv", 3 * layers * block},
                                                   {"attention.o", layers * block},
                                                   {"attention.lse", layers * rows * heads * 8},
                                                   {"swiglu.gate_up", layers * 2 * block}};
  EXPECT_EQ(run(false).held, expected);
}

TEST_F(TapeTest, WithoutRecordingNothingIsKept) {
  Tape tape(false);
  const Variable x = tape.input(x_, true);
  const Variable y = tape.recompute([&](const Variable& in) { return layer(tape, in); }, x);
  EXPECT_FALSE(x.requires_grad());
  EXPECT_FALSE(y.requires_grad());
  EXPECT_TRUE(tape.slots().empty());
  EXPECT_ERROR(tape.backward(y, x_), "nothing that trains");
  Tape recording;
  const Variable same = layer(recording, recording.input(x_, true));
  expect_same_bits(y.value, same.value);
}

TEST_F(TapeTest, InputsWithoutGradientRecordNothing) {
  Tape tape;
  const Variable y = layer(tape, tape.input(x_));
  EXPECT_FALSE(y.requires_grad());
  EXPECT_TRUE(tape.slots().empty());
  EXPECT_ERROR(tape.gradient(tape.input(x_)), "no gradient");
}

// A gradient that others hold is never rotated in place.
TEST_F(TapeTest, RopeLeavesAGradientThatOthersHold) {
  Tape tape;
  Variable x = tape.input(x_.clone(), true);
  x.tail = 8;
  const Variable y = rope(tape, x, head_dim, positions_, tables_, head_dim);
  EXPECT_EQ(y.value.raw(), x.value.raw());
  EXPECT_EQ(y.tail, 8);
  const Tensor g = random({rows, width}, 10), before = g.clone();
  tape.backward(y, g);
  expect_same_bits(g, before);
  const Tensor dx = tape.gradient(x);
  EXPECT_EQ(dx.pitch(), 64);
  expect_same_bits(dx.slice_cols(head_dim, width), g.slice_cols(head_dim, width));
  const Tensor expected = g.clone();
  rope_inplace(expected.slice_cols(0, head_dim), positions_, tables_, head_dim, true);
  expect_same_bits(dx, expected);
}

// An operation with parameters of its own is recorded though no input needs a gradient, and is told
// that none is wanted.
TEST_F(TapeTest, OperationsThatTrainAreRecorded) {
  Tape tape;
  const Variable x = tape.input(x_);
  bool called = false;
  const Variable y = tape.record(
      "trains", x_, {x}, {{"trains.x", x_}},
      [&](const Tensor&, const Node& node) {
        called = true;
        EXPECT_FALSE(node.needs(0));
        expect_same_bits(node.saved("trains.x"), x_);
        EXPECT_ERROR(node.saved("trains.y"), "[trains] has no slot trains.y");
        return std::vector<Tensor>{Tensor()};
      },
      true);
  tape.backward(y, x_);
  EXPECT_TRUE(called);
}

// A region's last result is read by nobody when it runs once more, nor is what only operations read
// that keep nothing and come to that end; who keeps something is given its inputs.
TEST_F(TapeTest, ASecondRunIsToldWhatNobodyReads) {
  Tape tape;
  std::vector<std::string> wanted;
  const auto operation = [&](const char* name, const std::vector<Variable>& inputs, bool keeps) {
    if (tape.result_wanted()) wanted.emplace_back(name);
    std::vector<Slot> slots;
    if (keeps) slots.push_back({"kept", inputs[0].value});
    return tape.record(name, x_, inputs, std::move(slots), [](const Tensor& g, const Node& node) {
      return std::vector<Tensor>{node.needs(0) ? g : Tensor(), node.needs(1) ? g : Tensor()};
    });
  };
  const Variable y = tape.recompute(
      [&](const Variable& in) {
        const Variable a = operation("a", {in, in}, false), b = operation("b", {a, a}, true);
        const Variable c = operation("c", {a, b}, false), d = operation("d", {b, a}, true);
        return operation("e", {c, d}, false);
      },
      tape.input(x_, true));
  EXPECT_EQ(wanted, (std::vector<std::string>{"a", "b", "c", "d", "e"}));
  wanted.clear();
  tape.backward(y, x_);
  EXPECT_EQ(wanted, (std::vector<std::string>{"a", "b"}));
}

TEST_F(TapeTest, ASecondRunKeepsScratchWhereItIsTold) {
  for (const bool keeps : {false, true}) {
    Tape tape;
    std::vector<bool> found;
    const auto operation = [&](const char* name, const Variable& in, bool offers) {
      if (offers) tape.keep_scratch(x_);
      return tape.record(name, x_, {in}, {}, [&](const Tensor& g, Node& node) {
        found.push_back(node.take_scratch().defined());
        return std::vector<Tensor>{g};
      });
    };
    // What is offered before an operation that is not recorded is not the next one's.
    const auto region = [&](const Variable& in) {
      const Variable a = operation("a", in, true);
      operation("not recorded", tape.input(x_), true);
      return operation("b", a, false);
    };
    const Variable y = tape.recompute(region, tape.input(x_, true), nullptr, keeps);
    const Variable z = tape.recompute(region, operation("first run alone", y, true));
    tape.backward(z, x_);
    EXPECT_EQ(found, (std::vector<bool>{false, false, false, false, keeps}));
  }
}

TEST_F(TapeTest, RecomputeThatTakesAnotherPathIsAnError) {
  Tape tape;
  const Variable x = tape.input(x_, true);
  bool second = false;
  const Variable y = tape.recompute(
      [&](const Variable& in) {
        const Variable n = second ? in : rms_norm(tape, in, norm_, 1e-5f);
        second = true;
        return add(tape, n, n);
      },
      x);
  EXPECT_ERROR(tape.backward(y, x_), "recompute took another path");
  Tape other;
  const auto nested = [&](const Variable& in) {
    return other.recompute([&](const Variable& v) { return add(other, v, v); }, in);
  };
  EXPECT_ERROR(other.recompute(nested, other.input(x_, true)), "do not nest");
}

}  // namespace
}  // namespace qlab::test
