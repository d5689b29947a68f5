#include "experiments/reservation.h"

#include <algorithm>
#include <limits>

namespace qlab {
namespace {

/// Batches of sequences whose tokens do not matter.
class Filler {
 public:
  void add(BatchBuilder& batch, const std::vector<int64_t>& lengths, const Adapter* adapter,
           bool train) {
    if (lengths.empty()) return;
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    if (static_cast<int64_t>(tokens_.size()) < longest)
      tokens_.resize(static_cast<size_t>(longest));
    std::vector<Sequence> sequences;
    for (const int64_t length : lengths) {
      const std::span<const int32_t> tokens(tokens_.data(), static_cast<size_t>(length));
      sequences.push_back({tokens, tokens, 0});
    }
    batch.add(sequences, adapter, train, 0.0f);
  }

 private:
  std::vector<int32_t> tokens_;
};

std::vector<int64_t> sorted_lengths(const Dataset& data) {
  std::vector<int64_t> lengths;
  for (const Example& e : data.examples)
    lengths.push_back(static_cast<int64_t>(e.input_ids.size()));
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  return lengths;
}

/// The gang's largest micro-batch with every sequence shortened in proportion, `tokens` in all.
BatchBuilder shortened(std::span<const Participant> gang, int64_t tokens) {
  const int64_t all = largest_tokens(gang);
  Filler filler;
  BatchBuilder batch;
  int64_t seen = 0;
  for (const Participant& p : gang) {
    std::vector<int64_t> lengths;
    for (const int64_t length : p.train_lengths) {
      const int64_t begin = seen * tokens / all, end = (seen + length) * tokens / all;
      if (begin < end) lengths.push_back(end - begin);
      seen += length;
    }
    filler.add(batch, lengths, p.adapter, true);
  }
  return batch;
}

BatchBuilder usual_batch(std::span<const Participant> gang) {
  Filler filler;
  BatchBuilder batch;
  for (const Participant& p : gang) filler.add(batch, p.usual_lengths, p.adapter, true);
  return batch;
}

// What the largest steps and other programs leave free may hold expanded weights.
void hold_weights(Llama& model, Stepper& stepper, const BatchBuilder& largest, int64_t resident) {
  const Device device = model.device();
  constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();
  int64_t left = unlimited;
  if (device.target == DeviceType::cuda) {
    const int64_t held = memory_account(device).total;
    left = available_memory(device);
    if (left < unlimited - held) left += model.resident_bytes() - left_to_others(left + held);
  }
  if (model.hold_resident(std::min(left, resident), largest.to(device.meta())))
    stepper.forget_plans();
}

}  // namespace

int64_t left_to_others(int64_t capacity) { return std::min(int64_t{1} << 30, capacity / 8); }

std::vector<int64_t> longest_examples(const Dataset& data, int64_t count) {
  const std::vector<int64_t> sorted = sorted_lengths(data);
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < count; ++i)
    lengths.push_back(sorted[static_cast<size_t>(i) %
                             std::min<size_t>(sorted.size(), static_cast<size_t>(count))]);
  return lengths;
}

std::vector<int64_t> usual_examples(const Dataset& data, int64_t count) {
  const std::vector<int64_t> sorted = sorted_lengths(data);
  const auto all = static_cast<int64_t>(sorted.size());
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < count; ++i)
    lengths.push_back(sorted[static_cast<size_t>((2 * i + 1) * all / (2 * count))]);
  return lengths;
}

std::vector<int64_t> largest_evaluation(const Dataset& data, int64_t batch_tokens) {
  std::vector<int64_t> lengths;
  int64_t tokens = 0;
  for (const int64_t length : sorted_lengths(data)) {
    if (!lengths.empty() && tokens + length > batch_tokens) break;
    lengths.push_back(length);
    tokens += length;
  }
  return lengths;
}

std::vector<ProfileLine> count_usual_step(Stepper& stepper, std::span<const Participant> gang) {
  stepper.forget_plans();
  const WorkCounter counter;
  stepper.reserve(usual_batch(gang), true);
  return counter.lines();
}

LargestStep reserve_steps(Llama& model, Stepper& stepper, std::span<const Participant> gang,
                          int64_t resident) {
  if (largest_tokens(gang) == 0) return {};
  const BatchBuilder largest = shortened(gang, largest_tokens(gang));
  LargestStep step;
  {
    const WorkCounter counter;
    step.plan = stepper.reserve(largest, true);
    step.work = counter.lines();
  }
  const auto reserve_too = [&](const BatchBuilder& batch, bool train) {
    const StepPlan& plan = stepper.reserve(batch, train);
    if (plan.bytes > step.plan.bytes) step.plan = plan, step.train = train;
  };
  for (const LeanerPolicy& leaner : stepper.leaner())
    reserve_too(shortened(gang, leaner.above), true);
  reserve_too(usual_batch(gang), true);
  Filler filler;
  for (const Participant& p : gang) {
    std::vector<int64_t> lengths = p.eval_lengths;
    const auto batch = [&] {
      BatchBuilder own;
      filler.add(own, lengths, p.adapter, false);
      return own;
    };
    while (lengths.size() > 1 && !stepper.fits(batch(), false)) lengths.resize(lengths.size() / 2);
    if (lengths.size() < p.eval_lengths.size())
      step.eval_tokens = std::min(step.eval_tokens, batch().tokens());
    if (!lengths.empty()) reserve_too(batch(), false);
  }
  hold_weights(model, stepper, largest, resident);
  return step;
}

}  // namespace qlab
