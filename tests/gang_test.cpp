// Trials that train together: what each computes does not depend on its company.
#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "core/ops/gemm.h"
#include "nn/adapter_products.h"
#include "optim/optimizer.h"
#include "tests/support/tiny_llama.h"

namespace qlab::test {
namespace {

struct Member {
  LoraSpec lora;
  float lr;
  std::vector<int64_t> lengths;  // of the sequences of step 0, 1, ..., in turn
};

LoraSpec lora(int64_t r, double alpha, const std::string& targets, double dropout,
              bool rslora = false) {
  LoraSpec spec;
  spec.r = r;
  spec.alpha = alpha;
  spec.pattern = targets;
  spec.dropout = dropout;
  spec.rslora = rslora;
  return spec;
}

constexpr int diverging = 4;
const std::vector<Member> members = {
    {lora(2, 4, "qv", 0), 1e-3f, {2, 1}},  // a single token trains nothing, but takes part
    {lora(8, 16, "attention", 0.1), 3e-3f, {37}},   {lora(16, 8, "mlp", 0, true), 1e-2f, {130}},
    {lora(5, 10, "all-linear", 0.3), 2e-3f, {511}}, {lora(4, 8, "all-linear", 0), 1e30f, {64}},
    {lora(4, 8, "qk", 0), 2e-3f, {20, 65}},         {lora(17, 16, "all-linear", 0.05), 1e-3f, {96}},
    {lora(3, 6, "mlp", 0), 5e-3f, {1, 300}},
};
constexpr int64_t steps = 5;

/// How steps use memory and time; no bit depends on it.
struct Plan {
  Recompute recompute = Recompute::none;
  bool resident = false;  // weights held expanded
  bool graphs = true;
};
std::string name_of(const Plan& plan) {
  constexpr const char* recompute[] = {"none", "selective", "full", "offload"};
  return fmt::format("recompute {}{}{}", recompute[static_cast<int>(plan.recompute)],
                     plan.resident ? ", resident" : "", plan.graphs ? ", graphs" : "");
}

/// What one member went through.
struct History {
  std::vector<double> loss;      // of each step
  std::vector<float> grad_norm;  // of each step
  Tensor first_gradient, parameters;
};

class GangTest : public OpTest {
 protected:
  void SetUp() override {
    OpTest::SetUp();
    if (IsSkipped()) return;
    model_ = tiny_llama(WeightFormat::nf4, GetParam());
  }

  /// Trains the members with these indices together, segments in that order.
  std::map<int, History> train(const std::vector<int>& gang, const Plan& plan = {},
                               int64_t count = steps) const {
    std::map<int, History> history;
    std::map<int, std::unique_ptr<Adapter>> adapters;
    std::map<int, AdamW> optimizers;
    for (const int i : gang) {
      adapters[i] = fresh_adapter(*model_, members[i].lora);
      optimizers.try_emplace(i, AdamWConfig{}, adapters[i]->sizes(), device());
    }
    Stepper stepper(*model_, plan.recompute, plan.graphs);
    for (int64_t s = 0; s < count; ++s) {
      BatchBuilder builder;
      std::vector<Tokens> tokens;
      std::vector<int64_t> rows;
      for (const int i : gang) {
        const std::vector<int64_t>& lengths = members[i].lengths;
        const int64_t length = lengths[static_cast<size_t>(s) % lengths.size()];
        tokens.push_back(random_tokens(length, static_cast<uint64_t>(100 * i + s), s));
        fill_zero(adapters[i]->gradients());
        const int64_t before = builder.loss_tokens();
        builder.add({tokens.back().sequence()}, adapters[i].get(), true,
                    1.0f / static_cast<float>(std::max<int64_t>(length - 1, 1)));
        rows.push_back(builder.loss_tokens() - before);
      }
      if (s == 0)
        model_->hold_resident(plan.resident ? std::numeric_limits<int64_t>::max() : 0,
                              builder.to(device().meta()));
      const std::vector<float> nll = stepper.run(builder, true);
      size_t row = 0;
      for (size_t g = 0; g < gang.size(); ++g) {
        const int i = gang[g];
        History& own = history[i];
        double sum = 0;
        for (int64_t j = 0; j < rows[g]; ++j) sum += nll[row++];
        own.loss.push_back(rows[g] > 0 ? sum / static_cast<double>(rows[g]) : 0);
        if (s == 0) own.first_gradient = adapters[i]->gradients().clone();
        optimizers.at(i).step(adapters[i]->parameters(), adapters[i]->gradients(), members[i].lr);
        adapters[i]->refresh();
        own.grad_norm.push_back(optimizers.at(i).grad_norm().to_vector<float>()[0]);
      }
    }
    for (const int i : gang) history[i].parameters = adapters[i]->parameters().clone();
    model_->hold_resident(0, {});
    return history;
  }

  void expect_equal(const History& a, const History& b, bool one_chain = true) const {
    if (device().is_cuda() ? dtype() != DType::f32 : one_chain) {
      EXPECT_EQ(a.loss, b.loss);
      EXPECT_EQ(a.grad_norm, b.grad_norm);
      expect_same_bits(a.parameters, b.parameters);
      return;
    }
    // fp32 products of the library depend on the number of rows, and the CPU's on where in K an
    // operand stands. The first gradient sees rounding alone. Later steps see weights that Adam
    // moved by at most about lr a step, in either direction where a gradient is no more than
    // rounding: the losses show how little that matters.
    const double bound = model_bound(dtype(), 511);
    EXPECT_LE(relative_difference(a.first_gradient, b.first_gradient), bound);
    for (size_t s = 0; s < a.loss.size(); ++s)
      EXPECT_NEAR(a.loss[s], b.loss[s], bound * (1 + static_cast<double>(s))) << "step " << s;
  }

  /// All that a device tells apart.
  std::vector<Plan> plans(bool folded) const {
    std::vector<Plan> all;
    for (const Recompute recompute : {Recompute::none, Recompute::selective, Recompute::full})
      for (const bool resident : {false, true})
        for (const bool graphs : {false, true})
          if ((folded || !resident) && (device().is_cuda() || !graphs))
            all.push_back({recompute, resident, graphs});
    return all;
  }

  std::unique_ptr<Llama> model_;
};

// Whatever the company, the order, and the plan of the step.
TEST_P(GangTest, AMemberDoesNotSeeTheOthers) {
  for (const bool folded : {false, true}) {
    SCOPED_TRACE(folded ? "folded" : "separate");
    model_->set_folded(folded);
    std::map<int, History> alone;
    for (int i = 0; i < static_cast<int>(members.size()); ++i) alone.merge(train({i}));
    const std::map<int, History> together = train({0, 1, 2, 3, 4, 5, 6, 7}, {Recompute::selective}),
                                 shuffled = train({4, 7, 2, 0, 6, 3, 1, 5}, {Recompute::full}),
                                 healthy = train({3, 1, 2});
    // The CPU's product is the sum of chains over 256 of K (core/cpu/gemm_tile.h). Eight folded
    // adapters make the tiny model's K longer than that, three do not. Models fold on CUDA in
    // 16 bits alone, where a product is one chain.
    for (int i = 0; i < static_cast<int>(members.size()); ++i) {
      if (i == diverging) continue;
      SCOPED_TRACE("member " + std::to_string(i));
      expect_equal(together.at(i), alone.at(i), !folded);
      expect_equal(shuffled.at(i), alone.at(i), !folded);
      if (healthy.contains(i)) expect_equal(healthy.at(i), alone.at(i));
      for (const double loss : alone.at(i).loss) EXPECT_TRUE(std::isfinite(loss));
      EXPECT_GT(relative_difference(alone.at(i).parameters,
                                    fresh_adapter(*model_, members[i].lora)->parameters()),
                0.0);
    }
    for (const auto& histories : {alone, together, shuffled}) {
      const History& diverged = histories.at(diverging);
      EXPECT_TRUE(std::isfinite(diverged.grad_norm[0]));
      EXPECT_FALSE(std::isfinite(diverged.grad_norm[2]));
      // A step whose gradient is not finite writes nothing.
      for (const double p : values(diverged.parameters)) ASSERT_TRUE(std::isfinite(p));
    }
  }
}

// One trial, three and eight, under every plan, against each alone under the simplest.
TEST_P(GangTest, LargeEveryPlanGivesTheSameBits) {
  for (const bool folded : {false, true}) {
    model_->set_folded(folded);
    std::map<int, History> alone;
    for (int i = 0; i < static_cast<int>(members.size()); ++i)
      alone.merge(train({i}, {.graphs = false}));
    for (const Plan& plan : plans(folded))
      for (const std::vector<int>& gang :
           {std::vector{3}, {2}, {3, 1, 2}, {7, 6, 5, 4, 3, 2, 1, 0}}) {
        const std::map<int, History> together = train(gang, plan);
        for (const int i : gang) {
          if (i == diverging) continue;
          SCOPED_TRACE(fmt::format("{}, {}, member {} of {}", folded ? "folded" : "separate",
                                   name_of(plan), i, gang.size()));
          // Where the CPU's chains end: see AMemberDoesNotSeeTheOthers.
          expect_equal(together.at(i), alone.at(i), !folded || gang.size() <= 3);
        }
      }
  }
}

// A layer of SmolLM2-135M: rows of 576 and 1,536, and three query heads to a key head.
TEST_P(GangTest, LargeShapesOfSmolLm2GiveTheSameBits) {
  LlamaConfig config = synthetic_config("smollm2-135m");
  config.num_hidden_layers = 1;
  config.vocab_size = 512;
  model_ = std::make_unique<Llama>(config, WeightSpec{WeightFormat::nf4}, dtype(), device(),
                                   tiny_tensor);
  constexpr int64_t two_steps = 2;
  for (const bool folded : {false, true}) {
    model_->set_folded(folded);
    std::map<int, History> alone;
    for (int i = 0; i < static_cast<int>(members.size()); ++i)
      alone.merge(train({i}, {.graphs = false}, two_steps));
    for (const std::vector<int>& gang : {std::vector{3}, {3, 1, 2}, {7, 6, 5, 4, 3, 2, 1, 0}}) {
      const std::map<int, History> together = train(gang, {Recompute::full, folded}, two_steps);
      for (const int i : gang) {
        if (i == diverging) continue;
        SCOPED_TRACE(
            fmt::format("{}, member {} of {}", folded ? "folded" : "separate", i, gang.size()));
        for (const double loss : alone.at(i).loss) EXPECT_TRUE(std::isfinite(loss));
        expect_equal(together.at(i), alone.at(i), !folded || gang.size() == 1);
      }
    }
  }
}

TEST_P(GangTest, SegmentsOfAnyLengthMeetTheirOwnAdapter) {
  std::vector<std::unique_ptr<Adapter>> adapters;
  std::vector<Tokens> tokens;
  BatchBuilder gang;
  constexpr std::array<int64_t, 4> lengths = {130, 1, 511, 37};
  for (size_t i = 0; i < lengths.size(); ++i) {
    adapters.push_back(trained_adapter(*model_, members[i].lora));
    tokens.push_back(random_tokens(lengths[i], i, static_cast<int64_t>(i)));
    gang.add({tokens.back().sequence()}, adapters.back().get(), true, 0.0f);
  }
  Tape tape(false);
  const Tensor hidden = model_->hidden(tape, gang.to(device())).value;
  int64_t begin = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    BatchBuilder alone;
    alone.add({tokens[i].sequence()}, adapters[i].get(), true, 0.0f);
    const Tensor own = model_->hidden(tape, alone.to(device())).value;
    const Tensor slice = hidden.slice_rows(begin, begin + lengths[i]);
    begin += lengths[i];
    if (device().is_cuda() && dtype() == DType::f32)
      EXPECT_LE(relative_difference(slice, own), model_bound(dtype(), 511)) << lengths[i];
    else
      expect_same_bits(slice, own);
  }
}

// Each product with the base is made once, whatever the number of trials.
// Separate adapters, forward: one for each of the 14 projections and one for the head, and two for
// each adapted projection of each trial. Backward: dx of every projection but q, k and v of the
// first layer, whose input needs no gradient, and of the head; for each adapted projection dB, ds,
// dA and, where dx is wanted, ds A. Folded adapters: the 8 groups of projections in place of the
// 14; s is one product per group, or one per projection with dropout; ds is one per group, and ds A
// is apart with dropout alone. A GPU's kernels leave one s and one dA per group, with dropout none.
TEST_P(GangTest, TheBaseIsMultipliedOnce) {
  struct Products {
    int64_t forward, backward;
  };
  const auto adapter_products = [&](const Member& member, bool folded) {
    std::vector<std::string> names;
    for (int layer = 0; layer < 2; ++layer)
      for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                               "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
        names.push_back("model.layers." + std::to_string(layer) + "." + name);
    constexpr std::array<int, 7> group_of = {0, 0, 0, 1, 2, 2, 3};
    std::set<int> groups;
    int64_t count = 0, with_dx = 0;
    for (const int index : resolve_targets(member.lora, names)) {
      groups.insert(index / 7 * 4 + group_of[static_cast<size_t>(index % 7)]);
      ++count;
      with_dx += index >= 3;
    }
    if (!folded) return Products{2 * count, 3 * count + with_dx};
    const bool dropout = member.lora.dropout > 0;
    const auto group_count = static_cast<int64_t>(groups.size());
    if (device().is_cuda() && dtype() == DType::bf16 && cuda::adapter_kernels_present())
      return dropout ? Products{0, 0} : Products{group_count, group_count};
    return Products{dropout ? count : group_count,
                    2 * count + group_count + (dropout ? with_dx : 0)};
  };
  for (const bool folded : {false, true}) {
    model_->set_folded(folded);
    for (const std::vector<int>& gang : {std::vector{3}, {3, 1}, {0, 1, 2, 3}}) {
      std::vector<std::unique_ptr<Adapter>> adapters;
      std::vector<Tokens> tokens;
      BatchBuilder builder;
      Products expected = folded ? Products{8 + 2, 8 - 1} : Products{14 + 2, 14 - 3};
      for (const int i : gang) {
        adapters.push_back(fresh_adapter(*model_, members[i].lora));
        tokens.push_back(random_tokens(20, static_cast<uint64_t>(i)));
        builder.add({tokens.back().sequence()}, adapters.back().get(), true, 1.0f);
        const Products own = adapter_products(members[i], folded);
        expected.forward += own.forward;
        expected.backward += own.backward;
      }
      const Batch batch = builder.to(device());
      const int64_t start = gemm_count();
      Tape tape;
      const Variable nll = model_->loss(tape, batch, model_->hidden(tape, batch));
      const int64_t forward = gemm_count() - start;
      tape.backward(nll);
      const int64_t backward = gemm_count() - start - forward;
      // The head's dx is formed with its loss.
      EXPECT_EQ(forward, expected.forward) << gang.size() << " trials, folded " << folded;
      EXPECT_EQ(backward, expected.backward) << gang.size() << " trials, folded " << folded;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, GangTest, model_cases, name);

}  // namespace
}  // namespace qlab::test
