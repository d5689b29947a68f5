#include "experiments/stepper.h"

namespace qlab {

Stepper::Stepper(const Llama& model, bool recompute)
    : model_(model), recompute_(recompute), memory_(model.device()) {}

Tensor Stepper::step(const Batch& batch, bool train) const {
  Tape tape(train);
  const Variable hidden = model_.hidden(tape, batch, recompute_);
  const Variable nll = model_.loss(tape, batch, hidden);
  if (train) tape.backward(nll);
  return nll.value;
}

const StepPlan& Stepper::plan(const BatchBuilder& batch, bool train) {
  std::vector<int64_t> key = batch.shape_key();
  key.push_back(train);
  auto it = plans_.find(key);
  if (it == plans_.end()) {
    constexpr size_t remembered = 256;
    if (plans_.size() >= remembered) plans_.clear();
    const Batch shapes = batch.to(model_.device().meta());
    PlanRecorder recorder;
    step(shapes, train);
    it = plans_.emplace(std::move(key), recorder.finish()).first;
  }
  return it->second;
}

void Stepper::reserve(const BatchBuilder& batch, bool train) {
  memory_.reserve(plan(batch, train));
}

std::vector<float> Stepper::run(const BatchBuilder& builder, bool train) {
  const StepPlan& step_plan = plan(builder, train);
  memory_.reserve(step_plan);
  MemoryTag tag(Category::workspace);
  const Batch batch = builder.to(model_.device());
  const MemoryTag activations(Category::activations);
  const StepMemory::Scope scope(memory_, step_plan);
  return step(batch, train).to_vector<float>();
}

}  // namespace qlab
