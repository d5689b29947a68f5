#include "experiments/stepper.h"

#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {
namespace {

#if defined(QLAB_SYNC_LAUNCHES)
constexpr bool recordable = false;  // a recording may not wait for its kernels
#else
constexpr bool recordable = true;
#endif

}  // namespace

Stepper::Stepper(const Llama& model, const RecomputePolicy& policy, bool graphs,
                 std::vector<LeanerPolicy> leaner)
    : model_(model),
      leaner_(std::move(leaner)),
      policies_{policy},
      graphs_(recordable && graphs && model.device().is_cuda() && StepMemory::planned()),
      memory_(model.device()),
      buffer_(model.device()),
      host_(model.device()) {
  for (const LeanerPolicy& leaner_policy : leaner_) policies_.emplace_back(leaner_policy.layers);
}

Tensor Stepper::step(const Batch& batch, bool train, size_t policy) {
  Tape tape(train);
  Variable hidden = model_.hidden(tape, batch, policies_[policy], nullptr, &host_);
  WorkCounter::next_part();
  const Variable nll = model_.loss(tape, batch, hidden);
  hidden.value = Tensor();  // backward does not read it, and has its peak soon
  WorkCounter::next_part();
  if (train) tape.backward(nll);
  model_.end_step();
  WorkCounter::next_part();
  return nll.value;
}

Stepper::Shape& Stepper::shape(const BatchBuilder& batch, bool train, bool within) {
  model_.cover_positions(batch.max_length());
  std::vector<int64_t> key = batch.shape_key();
  key.push_back(train);
  auto it = shapes_.find(key);
  if (it == shapes_.end()) {
    constexpr size_t remembered = 256;
    if (shapes_.size() >= remembered) forget_plans();
    const Batch shapes = batch.to(model_.device().meta(), model_.host_embeddings());
    const auto planned = [&](size_t policy) {
      PlanRecorder recorder(model_.device().is_meta());
      step(shapes, train, policy);
      StepPlan plan = recorder.finish();
      if (plan.bytes > memory_.bytes()) plan.pack();
      return plan;
    };
    size_t policy = 0;
    while (train && policy < leaner_.size() && leaner_[policy].above < batch.tokens()) ++policy;
    StepPlan plan = planned(policy);
    const bool bound = within && train && memory_.bytes() > 0;
    while (bound && plan.bytes > memory_.bytes() && policy < leaner_.size())
      plan = planned(++policy);
    it = shapes_.try_emplace(std::move(key)).first;
    it->second.plan = std::move(plan);
    it->second.policy = policy;
  }
  return it->second;
}

const StepPlan& Stepper::reserve(const BatchBuilder& batch, bool train) {
  StepPlan& plan = shape(batch, train, false).plan;
  memory_.reserve(plan);
  host_.reserve();
  batch.reserve(buffer_, model_.host_embeddings());
  return plan;
}

bool Stepper::fits(const BatchBuilder& batch, bool train, bool growing) {
  if (!StepMemory::planned()) return true;
  const int64_t more = shape(batch, train, false).plan.bytes - memory_.bytes();
  return more <= 0 || (growing && more <= available_memory(model_.device()));
}

Tensor Stepper::idle() const {
  if (memory_.bytes() == 0) return {};
  return Tensor::from_storage(
      Storage::wrap(const_cast<void*>(memory_.base()), memory_.bytes(), {}, model_.device()), 0,
      {memory_.bytes()}, DType::u8);
}

void Stepper::forget_plans() { shapes_.clear(), graph_count_ = 0; }

std::vector<float> Stepper::run(const BatchBuilder& builder, bool train) {
  Shape& own = shape(builder, train, true);
  memory_.reserve(own.plan);
  host_.reserve();
  const MemoryTag workspace(Category::workspace);
  const Batch batch = builder.to(buffer_, model_.host_embeddings());
  const auto issue = [&] {
    const MemoryTag activations(Category::activations);
    const StepMemory::Scope scope(memory_, own.plan);
    copy(buffer_.results(), step(batch, train, own.policy));
  };
  const bool moved = own.memory != memory_.base() || own.batch != buffer_.base() ||
                     own.positions != model_.position_generation() ||
                     own.host != host_.generation();
  constexpr int most_graphs = 64;  // each holds some megabytes
  if (graphs_ && own.seen && (own.graph == nullptr ? graph_count_ < most_graphs : moved)) {
    graph_count_ += own.graph == nullptr;
    own.graph = std::make_unique<cuda::Graph>(issue);
    own.memory = memory_.base(), own.batch = buffer_.base();
    own.positions = model_.position_generation(), own.host = host_.generation();
  }
  if (own.graph != nullptr)
    own.graph->launch();
  else
    issue();
  own.seen = true;
  last_policy_ = own.policy;
  std::vector<float> nll = buffer_.read_results();
  nll.resize(static_cast<size_t>(builder.loss_tokens()));
  return nll;
}

}  // namespace qlab
