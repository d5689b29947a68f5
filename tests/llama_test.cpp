#include "nn/llama.h"

#include <algorithm>
#include <limits>

#include "core/ops/copy.h"
#include "core/ops/gemm.h"
#include "experiments/evaluate.h"
#include "experiments/generate.h"
#include "tests/support/tiny_llama.h"

namespace qlab::test {
namespace {

class LlamaTest : public OpTest {
 protected:
  std::unique_ptr<Llama> model(WeightFormat format) const { return tiny_llama(format, GetParam()); }

  /// nll of every trained row of the sequences, as one packed batch.
  static std::vector<float> nll(Stepper& stepper, const std::vector<Tokens>& sequences,
                                const Adapter* adapter, bool train = false) {
    std::vector<Sequence> all;
    for (const Tokens& t : sequences) all.push_back(t.sequence());
    BatchBuilder builder;
    builder.add(all, adapter, false, 1.0f);
    return stepper.run(builder, train);
  }
  /// Equal on the CPU; on a GPU up to the rounding of two runs, since its products depend on the
  /// row count. The logits of this model are of size one.
  double bound() const { return device().is_cuda() ? 2 * model_bound(dtype(), 512) : 0; }
  void expect_equal_rows(const std::vector<float>& a, const std::vector<float>& b) const {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], bound()) << "row " << i;
  }
};

TEST_P(LlamaTest, PackedSequencesAreTheSequencesAlone) {
  const auto llama = model(WeightFormat::nf4);
  LoraSpec spec;
  spec.r = 4;
  const auto adapter = trained_adapter(*llama, spec);
  Stepper stepper(*llama, Recompute::none);
  std::vector<Tokens> all;
  std::vector<float> alone;
  for (const int64_t length : {2, 1, 37, 5, 130}) {
    all.push_back(random_tokens(length, static_cast<uint64_t>(length)));
    const std::vector<float> own = nll(stepper, {all.back()}, adapter.get());
    alone.insert(alone.end(), own.begin(), own.end());
  }
  expect_equal_rows(nll(stepper, all, adapter.get()), alone);
}

TEST_P(LlamaTest, AFreshAdapterIsNoAdapter) {
  const auto llama = model(WeightFormat::nf4);
  Stepper stepper(*llama, Recompute::none);
  const std::vector<Tokens> tokens = {random_tokens(40, 1), random_tokens(9, 2)};
  const auto adapter = fresh_adapter(*llama, {});
  EXPECT_EQ(nll(stepper, tokens, adapter.get()), nll(stepper, tokens, nullptr));
}

// The adapter's products read the same values whether the base is stored in 4 bits or not.
TEST_P(LlamaTest, QloraIsLoraOnTheDequantizedWeights) {
  const auto quantized = model(WeightFormat::nf4);
  const auto plain = tiny_llama(WeightFormat::fp32, GetParam(), rounded_to_nf4);
  quantized->set_folded(false);
  LoraSpec spec;
  spec.dropout = 0.1;
  const auto a = trained_adapter(*quantized, spec), b = trained_adapter(*plain, spec);
  Stepper one(*quantized, Recompute::none), other(*plain, Recompute::none);
  const std::vector<Tokens> tokens = {random_tokens(50, 3), random_tokens(20, 4)};
  EXPECT_EQ(nll(one, tokens, a.get(), true), nll(other, tokens, b.get(), true));
  expect_same_bits(a->gradients(), b->gradients());
}

// Two orders of the same sums.
TEST_P(LlamaTest, FoldedAdaptersAreSeparateAdapters) {
  for (const double p : {0.0, 0.1}) {
    SCOPED_TRACE(p);
    const auto folded = model(WeightFormat::nf4), separate = model(WeightFormat::nf4);
    folded->set_folded(true);
    separate->set_folded(false);
    LoraSpec spec;
    spec.r = 5;
    spec.dropout = p;
    const auto a = trained_adapter(*folded, spec), b = trained_adapter(*separate, spec);
    const std::vector<Tokens> tokens = {random_tokens(50, 3), random_tokens(20, 4)};
    Stepper one(*folded, Recompute::none), other(*separate, Recompute::none);
    const auto run = [&](Stepper& stepper, const Adapter* adapter) {
      BatchBuilder builder;
      for (const Tokens& t : tokens) builder.add({t.sequence()}, adapter, true, 1.0f);
      return stepper.run(builder, true);
    };
    const std::vector<float> x = run(one, a.get()), y = run(other, b.get());
    const double bound = model_bound(dtype(), 50);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], y[i], bound * std::abs(y[i]));
    EXPECT_LE(relative_difference(a->gradients(), b->gradients()), bound);
    EXPECT_GT(relative_difference(a->gradients(), fresh_adapter(*folded, spec)->gradients()), 0.0);
  }
}

// The plan of a step, the weights held expanded and the graph decide nothing but time and memory.
TEST_P(LlamaTest, WeightsHeldExpandedChangeNoBit) {
  const auto llama = model(WeightFormat::nf4);
  llama->set_folded(true);
  LoraSpec spec;
  spec.r = 3;
  const auto a = trained_adapter(*llama, spec), b = trained_adapter(*llama, spec);
  const std::vector<Tokens> tokens = {random_tokens(33, 5, 11), random_tokens(64, 6, 12)};
  Stepper first(*llama, Recompute::none), second(*llama, Recompute::none);
  const std::vector<float> expected = nll(first, tokens, a.get(), true);
  BatchBuilder batch;
  for (const Tokens& t : tokens) batch.add({t.sequence()}, b.get(), true, 1.0f);
  EXPECT_TRUE(llama->hold_resident(int64_t{1} << 30, batch.to(device().meta())));
  EXPECT_FALSE(llama->hold_resident(int64_t{1} << 30, batch.to(device().meta())));
  const int64_t whole = llama->resident_bytes();
  EXPECT_GT(whole, 0);
  EXPECT_EQ(nll(second, tokens, b.get(), true), expected);
  expect_same_bits(a->gradients(), b->gradients());
  // Half of it, and what was computed before stays.
  EXPECT_TRUE(llama->hold_resident(whole / 2, batch.to(device().meta())));
  EXPECT_GT(llama->resident_bytes(), 0);
  EXPECT_LE(llama->resident_bytes(), whole / 2);
  fill_zero(b->gradients());
  Stepper third(*llama, Recompute::none);
  EXPECT_EQ(nll(third, tokens, b.get(), true), expected);
  expect_same_bits(a->gradients(), b->gradients());
  EXPECT_TRUE(llama->hold_resident(0, batch.to(device().meta())));
  EXPECT_EQ(llama->resident_bytes(), 0);
}

TEST_P(LlamaTest, RecomputeChangesNoBit) {
  const auto llama = model(WeightFormat::nf4);
  using enum Recompute;
  const std::vector<RecomputePolicy> policies = {selective,
                                                 full,
                                                 RecomputePolicy({full, none}),
                                                 RecomputePolicy({none, full}),
                                                 RecomputePolicy({selective, full}),
                                                 RecomputePolicy({full, full}, 1),
                                                 RecomputePolicy({full, full}, 2),
                                                 RecomputePolicy({selective, full}, 2),
                                                 RecomputePolicy({none, selective})};
  // down_proj alone: what precedes the first adapter of a layer is not on the tape.
  for (const char* targets : {"all-linear", "mlp", ".*o_proj", ".*down_proj", ".*1.mlp.down_proj"})
    for (size_t i = 0; i < 2 * policies.size(); ++i) {
      const bool folded = i % 2 == 1;
      const RecomputePolicy& policy = policies[i / 2];
      SCOPED_TRACE(fmt::format("{}, policy {}, folded {}", targets, i / 2, folded));
      LoraSpec spec;
      spec.r = 3;
      spec.dropout = 0.2;
      spec.pattern = targets;
      llama->set_folded(folded);
      const auto a = trained_adapter(*llama, spec), b = trained_adapter(*llama, spec);
      Stepper kept(*llama, Recompute::none), again(*llama, policy);
      const std::vector<Tokens> tokens = {random_tokens(33, 5, 11), random_tokens(64, 6, 12)};
      for (int micro = 0; micro < 2; ++micro)
        EXPECT_EQ(nll(kept, tokens, a.get(), true), nll(again, tokens, b.get(), true));
      expect_same_bits(a->gradients(), b->gradients());
    }
}

// A second run multiplies with the weights again, but for down_proj's. It finds the adapters' s,
// unless they are wide beside their input, or nothing is to stay on the device.
TEST_P(LlamaTest, RecomputeKeepsNarrowProductsOfAdapters) {
  LlamaConfig config = synthetic_config("tiny");
  config.hidden_size = 768, config.intermediate_size = 256, config.head_dim = 64;
  Llama llama(config, WeightSpec{WeightFormat::nf4}, dtype(), device(), tiny_tensor);
  const Tokens tokens = random_tokens(33, 5, 11);
  HostSlots host(device());
  struct Result {
    std::unique_ptr<Adapter> adapter;
    int64_t held = 0, products = 0;  // of s between the passes; in the backward pass
  };
  const auto run = [&](const LoraSpec& spec, Recompute recompute) {
    Result result{trained_adapter(llama, spec)};
    BatchBuilder builder;
    builder.add({tokens.sequence()}, result.adapter.get(), true, 1.0f);
    const Batch batch = builder.to(device());
    if (recompute == Recompute::offload) {
      Tape planned;
      llama.hidden(planned, builder.to(device().meta()), recompute, nullptr, &host);
      host.reserve();
    }
    Tape tape;
    const Variable h = llama.hidden(tape, batch, recompute, nullptr, &host);
    for (const auto& [name, bytes] : tape.slots()) {
      if (recompute >= Recompute::full) {
        EXPECT_EQ(name, "linear.s");
      }
      if (name == "linear.s") result.held += bytes;
    }
    const Variable nll = llama.loss(tape, batch, h);
    const int64_t before = gemm_count();
    tape.backward(nll);
    result.products = gemm_count() - before;
    return result;
  };
  for (const bool folded : {false, true})
    for (const double p : {0.0, 0.2})
      for (const int64_t r : {3, 20}) {
        SCOPED_TRACE(fmt::format("dropout {}, r {}, folded {}", p, r, folded));
        LoraSpec spec;
        spec.r = r;
        spec.dropout = p;
        llama.set_folded(folded);
        const Result kept = run(spec, Recompute::none);
        for (const Recompute recompute :
             {Recompute::selective, Recompute::full, Recompute::offload}) {
          const Result again = run(spec, recompute);
          expect_same_bits(kept.adapter->gradients(), again.adapter->gradients());
          if (recompute == Recompute::selective) continue;
          const bool stays = r == 3 && recompute == Recompute::full;
          constexpr int64_t widths = 48 + 16 + 32 + 16;  // of the groups, in steps of 16
          EXPECT_EQ(again.held,
                    stays ? 2 * 33 * widths * static_cast<int64_t>(size_of(dtype())) : 0);
          if (!stays && device().is_cuda()) continue;  // kernels, or the library's products
          const int64_t base = folded ? 3 : 2 * 6;     // separate: with W, and s with B
          const int64_t s = stays ? 0 : folded && p == 0 ? 4 : 7;
          EXPECT_EQ(again.products - kept.products, 2 * (base + s));
        }
      }
}

// Sums over tokens have the same partition whether an MLP runs in chunks or at once.
TEST_P(LlamaTest, ChunksOfRowsChangeNoBit) {
  const auto llama = model(WeightFormat::nf4);
  LoraSpec spec, sparse, apart;
  spec.r = apart.r = 3;
  spec.dropout = 0.1;
  sparse.pattern = ".*down_proj";
  apart.pattern = ".*(q|gate)_proj";  // of its chunks nothing behind SwiGLU is read
  const auto batch_of = [](const std::vector<Tokens>& tokens, size_t begin, size_t end) {
    std::vector<Sequence> sequences;
    for (size_t i = begin; i < end; ++i) sequences.push_back(tokens[i].sequence());
    return sequences;
  };
  std::vector<Tokens> tokens;  // segments of 9,008, 300 and 8,500 rows
  for (int i = 0; i < 18; ++i) tokens.push_back(random_tokens(500 + (i == 0 ? 8 : 0), i, i));
  tokens.push_back(random_tokens(300, 50, 50));
  for (int i = 0; i < 17; ++i) tokens.push_back(random_tokens(500, 100 + i, i));
  for (const bool folded : {false, true}) {
    SCOPED_TRACE(folded ? "folded" : "separate");
    llama->set_folded(folded);
    const auto run = [&](Recompute recompute) {
      std::vector<std::unique_ptr<Adapter>> adapters;
      for (const LoraSpec* s : {&spec, &sparse, &apart})
        adapters.push_back(trained_adapter(*llama, *s));
      BatchBuilder builder;
      builder.add(batch_of(tokens, 0, 18), adapters[0].get(), true, 1e-3f);
      builder.add(batch_of(tokens, 18, 19), adapters[1].get(), true, 1e-2f);
      builder.add(batch_of(tokens, 19, 36), adapters[2].get(), true, 1e-3f);
      Stepper stepper(*llama, recompute);
      return std::pair(stepper.run(builder, true), std::move(adapters));
    };
    const auto kept = run(Recompute::none);
    for (const Recompute recompute : {Recompute::full, Recompute::offload}) {
      const auto chunked = run(recompute);
      EXPECT_EQ(kept.first, chunked.first);
      for (size_t i = 0; i < 3; ++i)
        expect_same_bits(kept.second[i]->gradients(), chunked.second[i]->gradients());
    }
  }
}

// Of one row a GPU's products promise no bits, so the last unit of a segment is not computed alone;
// a segment that is one row trains nothing.
TEST(RowChunks, AUnitOfOneRowJoinsTheOneBefore) {
  Batch batch;
  const auto add = [&](int64_t rows) {
    const int64_t begin = batch.segments.empty() ? 0 : batch.segments.back().end;
    batch.segments.push_back({begin, begin + rows, 0, 0, nullptr, false});
    return begin + rows;
  };
  const int64_t first = add(row_unit + 1), second = add(1), third = add(2 * row_unit + 1);
  const std::vector<int64_t> expected = {0, first, second, second + row_unit, third};
  std::vector<int64_t> bounds = {0};
  for (const RowChunk& chunk : row_chunks(batch)) {
    EXPECT_EQ(chunk.begin, bounds.back());
    bounds.push_back(chunk.end);
  }
  EXPECT_EQ(bounds, expected);
}

// Rows that come with the batch are the rows of the table.
TEST_P(LlamaTest, EmbeddingsMayLieOnTheHost) {
  LlamaConfig untied = synthetic_config("tiny");
  untied.tie_word_embeddings = false;
  const auto load = [&](bool host) {
    return std::make_unique<Llama>(untied, WeightSpec{WeightFormat::nf4}, dtype(), device(),
                                   tiny_tensor, host);
  };
  const auto there = load(false), here = load(true);
  const auto a = trained_adapter(*there, {}), b = trained_adapter(*here, {});
  Stepper one(*there, Recompute::full), other(*here, Recompute::full);
  for (int i = 0; i < 3; ++i) {  // eager, recorded, replayed
    const std::vector<Tokens> tokens = {random_tokens(33, 5 + i, 11), random_tokens(64, 6, 12)};
    EXPECT_EQ(nll(one, tokens, a.get(), true), nll(other, tokens, b.get(), true));
  }
  expect_same_bits(a->gradients(), b->gradients());
  SamplingOptions options;
  options.max_new_tokens = 8;
  const std::vector<int32_t> prompt = random_tokens(9, 7).ids;
  EXPECT_EQ(generate(*there, a.get(), prompt, {}, options),
            generate(*here, b.get(), prompt, {}, options));
  EXPECT_THROW(Llama(synthetic_config("tiny"), WeightSpec{}, dtype(), device(), tiny_tensor, true),
               Error);
}

// Token by token over the cache, against one pass over the finished text.
TEST_P(LlamaTest, GenerationIsTheFullForward) {
  const auto llama = model(WeightFormat::nf4);
  LoraSpec spec;
  spec.pattern = "mlp";
  const auto adapter = trained_adapter(*llama, spec);
  const std::vector<int32_t> prompt = random_tokens(9, 7).ids;
  SamplingOptions options;
  options.max_new_tokens = 24;
  const std::vector<int32_t> produced = generate(*llama, adapter.get(), prompt, {}, options);
  ASSERT_EQ(produced.size(), 24u);

  Tokens whole{prompt, 0};
  whole.ids.insert(whole.ids.end(), produced.begin(), produced.end());
  BatchBuilder builder;
  builder.add({whole.sequence()}, adapter.get(), false, 0.0f);
  Tape tape(false);
  const Tensor hidden = llama->hidden(tape, builder.to(device())).value;
  const std::vector<double> logits = values(llama->logits(hidden));
  // A token may differ only where two logits are as close as rounding on a GPU may bring them.
  for (size_t i = 0; i < produced.size(); ++i) {
    const auto row = logits.begin() + static_cast<std::ptrdiff_t>((prompt.size() + i - 1) * 512);
    EXPECT_GE(row[produced[i]], *std::max_element(row, row + 512) - bound()) << "token " << i;
  }
}

TEST_P(LlamaTest, GenerationStops) {
  const auto llama = model(WeightFormat::fp32);
  SamplingOptions options;
  options.max_new_tokens = 20;
  const std::vector<int32_t> prompt = {1, 2, 3};
  const std::vector<int32_t> all = generate(*llama, nullptr, prompt, {}, options);
  const auto stop = std::find(all.begin(), all.end(), all[4]);
  EXPECT_EQ(generate(*llama, nullptr, prompt, {all[4]}, options),
            std::vector<int32_t>(all.begin(), stop + 1));
  int count = 0;
  generate(*llama, nullptr, prompt, {}, options, [&](int32_t) { return ++count < 3; });
  EXPECT_EQ(count, 3);
  options.max_new_tokens = 510;
  EXPECT_ERROR(generate(*llama, nullptr, prompt, {}, options), "exceed the model's 512 positions");
  options.max_new_tokens = std::numeric_limits<int64_t>::max();
  EXPECT_ERROR(generate(*llama, nullptr, prompt, {}, options), "exceed the model's 512 positions");
}

TEST(Sampling, TakesTheLikeliestMass) {
  const std::vector<float> logits = {0, 1, 2, 1};  // shares 0.072, 0.197, 0.534, 0.197
  EXPECT_EQ(sample({1, 3, 3}, 0, 1, 0.99), 1);     // the first of equals
  EXPECT_EQ(sample(logits, 1, 1, 0), 2);
  EXPECT_EQ(sample(logits, 1, 1, 0.53), 2);
  EXPECT_EQ(sample(logits, 1, 1, 0.54), 1);
  EXPECT_EQ(sample(logits, 1, 1, 0.74), 3);
  EXPECT_EQ(sample(logits, 1, 1, 0.999), 0);
  EXPECT_EQ(sample(logits, 1, 0.6, 0.72), 2);  // of 2 and 1 alone: 0.731 and 0.269
  EXPECT_EQ(sample(logits, 1, 0.6, 0.74), 1);
  EXPECT_EQ(sample(logits, 1, 0.5, 0.999), 2);
  EXPECT_EQ(sample(logits, 1, 0, 0.999), 2);  // never fewer than one
  EXPECT_EQ(sample(logits, 0.01, 1, 0.999), 2);
  EXPECT_EQ(sample(logits, 1e9, 1, 0.999), 0);
}

TEST_P(LlamaTest, EvaluationDoesNotDependOnItsBatches) {
  const auto llama = model(WeightFormat::nf4);
  Dataset data;
  for (const int64_t length : {30, 2, 77, 16, 16, 120, 9}) {
    const std::vector<int32_t> ids = random_tokens(length, static_cast<uint64_t>(length)).ids;
    data.examples.push_back({ids, ids});
    data.examples.back().labels[0] = not_trained;
  }
  data.examples[2].labels.assign(77, not_trained);
  data.examples[2].labels[40] = 7;
  const auto adapter = trained_adapter(*llama, {});
  Stepper stepper(*llama, Recompute::none);
  const Evaluation one = evaluate(stepper, data, adapter.get(), {}, 1);
  EXPECT_EQ(one.trained_tokens, 29 + 1 + 1 + 15 + 15 + 119 + 8);
  EXPECT_EQ(one.tokens, 270);
  for (const int64_t batch_tokens : {100, 4096}) {
    const Evaluation other = evaluate(stepper, data, adapter.get(), {}, batch_tokens);
    EXPECT_NEAR(one.loss, other.loss, bound());
    for (size_t i = 0; i < one.example_loss.size(); ++i)
      EXPECT_NEAR(one.example_loss[i], other.example_loss[i], bound()) << "example " << i;
  }
  int asked = 0;
  EXPECT_TRUE(evaluate(
                  stepper, data, nullptr, [&](size_t) { return ++asked > 2; }, 1)
                  .stopped);
}

INSTANTIATE_TEST_SUITE_P(Models, LlamaTest, model_cases, name);

// Central differences of the loss in fp32. The loss is a mean of R values, each within about
// 2^-22 of 6, so a difference over 2h is known to about 2^-22 6 / (sqrt(R) h): with h = 0.02 and
// R = 58 that is 1e-5, below 1 % of the largest gradients; the third derivative adds about h^2.
TEST(LlamaGradient, OfLoraIsThatOfDifferences) {
  const auto llama = tiny_llama(WeightFormat::fp32, cpu_f32);
  LoraSpec spec;
  spec.r = 3;
  spec.alpha = 5;
  const auto adapter = trained_adapter(*llama, spec);
  Stepper stepper(*llama, Recompute::none);
  const Tokens first = random_tokens(40, 21), second = random_tokens(20, 22);
  BatchBuilder builder;
  builder.add({first.sequence(), second.sequence()}, adapter.get(), false, 1.0f / 58);
  const auto loss = [&] { return mean(stepper.run(builder, false)); };
  stepper.run(builder, true);

  constexpr float h = 0.02f;
  for (const Adapter::Shape& m : adapter->modules()) {
    const LoraModule& module = adapter->module(m.name);
    for (const auto& [x, dx] : {std::pair(module.a, module.da), std::pair(module.b, module.db)}) {
      const std::vector<float> gradient = dx.to_vector<float>();
      const auto largest = std::max_element(gradient.begin(), gradient.end(), [](float a, float b) {
        return std::abs(a) < std::abs(b);
      });
      float& element = x.data<float>()[largest - gradient.begin()];
      const float saved = element;
      element = saved + h;
      const double above = loss(), step = element;
      element = saved - h;
      const double below = loss(), expected = (above - below) / (step - element);
      element = saved;
      EXPECT_NEAR(*largest, expected, 2e-2 * std::abs(expected))
          << m.name << (&x == &module.a ? " A" : " B");
    }
  }
}

// Biases (Qwen2), an own lm_head and a wider head than the hidden size go the same way.
TEST(LlamaGradient, OfAModelWithBiases) {
  LlamaConfig config = synthetic_config("tiny");
  config.qkv_bias = config.o_bias = config.mlp_bias = true;
  config.tie_word_embeddings = false;
  config.head_dim = 24;
  const Llama llama(config, {WeightFormat::fp32}, DType::f32, Device::cpu(), tiny_tensor);
  LoraSpec spec;
  spec.r = 2;
  const auto adapter = trained_adapter(llama, spec);
  Stepper stepper(llama, Recompute::full);
  const Tokens tokens = random_tokens(50, 23);
  BatchBuilder builder;
  builder.add({tokens.sequence()}, adapter.get(), false, 1.0f / 49);
  stepper.run(builder, true);
  // Along the gradient itself: the loss changes by h |g| when the parameters move by h g / |g|.
  const std::vector<float> g = adapter->gradients().to_vector<float>();
  double norm = 0;
  for (const float value : g) norm += static_cast<double>(value) * value;
  norm = std::sqrt(norm);
  const std::vector<float> start = adapter->parameters().to_vector<float>();
  const auto loss_at = [&](double h) {
    for (size_t i = 0; i < g.size(); ++i)
      adapter->parameters().data<float>()[i] = static_cast<float>(start[i] + h * g[i] / norm);
    return mean(stepper.run(builder, false));
  };
  // The third derivative is large along this direction: h^2 of it is 1e-3 here.
  constexpr double h = 1e-3;
  EXPECT_NEAR((loss_at(h) - loss_at(-h)) / (2 * h), norm, 3e-3 * norm);
}

}  // namespace
}  // namespace qlab::test
