#include "autograd/tape.h"

#include "core/ops/add.h"

namespace qlab {

size_t Node::find(std::string_view name) const {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (slots_[i].name == name) {
      QLAB_CHECK(slots_[i].value.defined(), "[{}] slot {} was dropped and not filled again", op_,
                 name);
      return i;
    }
  fail("[{}] has no slot {}", op_, name);
}

const Tensor& Node::saved(std::string_view name) const { return slots_[find(name)].value; }

Tensor Node::take(std::string_view name) {
  return std::exchange(slots_[find(name)].value, Tensor());
}

Variable Tape::input(Tensor value, bool requires_grad) {
  return {std::move(value), recording_ && requires_grad ? variables_++ : -1};
}

Variable Tape::record(const char* op, Tensor result, const std::vector<Variable>& inputs,
                      std::vector<Slot> slots, Backward backward, bool trains, Sum sum) {
  Tensor scratch = std::exchange(next_scratch_, Tensor());
  bool wanted = trains;
  for (const Variable& v : inputs) wanted |= v.requires_grad();
  if (!recording_ || !wanted) return {std::move(result), -1};

  for (const Slot& slot : slots)
    if (slot.value.defined()) slot.value.storage()->set_slot(slot.name);
  const auto dropped = [&](const Slot& slot) {
    return !keeps_slots_ || (policy_ ? policy_(slot.name) : slot.policy) == SlotPolicy::recompute;
  };
  if (mode_ == Mode::refill) {
    Node& node = nodes_.at(cursor_++);
    QLAB_CHECK(node.op_ == op && node.slots_.size() == slots.size(),
               "recompute took another path: {} instead of {}", op, node.op_);
    for (size_t i = 0; i < slots.size(); ++i)
      if (!node.slots_[i].value.defined()) node.slots_[i].value = std::move(slots[i].value);
    node.scratch_ = std::move(scratch);
    return {std::move(result), node.output_};
  }
  Node node;
  node.op_ = op;
  node.place_ = planned_path();
  for (const Variable& v : inputs) node.inputs_.push_back(v.id);
  node.output_ = variables_++;
  node.slots_ = std::move(slots);
  if (mode_ == Mode::drop)
    for (Slot& slot : node.slots_)
      if (dropped(slot)) slot.value = Tensor();
  node.backward_ = std::move(backward);
  node.sum_ = sum;
  nodes_.push_back(std::move(node));
  return {std::move(result), nodes_.back().output_};
}

Tensor Tape::kept(std::string_view slot) const {
  if (mode_ != Mode::refill) return {};
  for (const Slot& own : nodes_.at(cursor_).slots_)
    if (own.name == slot) return own.value;
  return {};
}

Variable Tape::recompute(const std::function<Variable(const Variable&)>& forward,
                         const Variable& input, HostSlots* host, bool scratch) {
  QLAB_CHECK(mode_ == Mode::normal, "recompute regions do not nest");
  if (!recording_) return forward(input);
  const size_t first = nodes_.size();
  if (host != nullptr) host->put(regions_.size(), input.value);
  mode_ = Mode::drop;
  keeps_slots_ = host == nullptr;
  Variable output = forward(input);
  mode_ = Mode::normal;
  if (host != nullptr) host->wait();
  if (nodes_.size() > first) {
    find_readers(first);
    const Tensor& x = input.value;
    regions_.push_back({first, nodes_.size(), input, forward, host, scratch, regions_.size(),
                        x.shape(), x.dtype(), x.device()});
    if (host != nullptr) regions_.back().input.value = Tensor();
  }
  return output;
}

// A second run is there for the slots alone, and who keeps some reads its inputs to make them.
void Tape::find_readers(size_t first) {
  std::vector<bool> read(static_cast<size_t>(variables_), false);
  for (size_t n = nodes_.size(); n-- > first;) {
    Node& node = nodes_[n];
    node.read_again_ = read[static_cast<size_t>(node.output_)];
    if (!node.read_again_ && node.slots_.empty()) continue;
    for (const int input : node.inputs_)
      if (input >= 0) read[static_cast<size_t>(input)] = true;
  }
}

void Tape::fetch(Region& region) {
  const MemoryName name("back from the host");
  region.input.value = Tensor::empty(region.shape, region.dtype, region.device);
  region.host->get(region.slot, region.input.value);
}

/// By the slots of the nodes behind `first`.
int64_t Tape::bytes_kept(size_t first) const {
  int64_t bytes = 0;
  for (size_t n = first; n < nodes_.size(); ++n)
    for (const Slot& slot : nodes_[n].slots_)
      if (slot.value.defined()) bytes += slot.value.bytes();
  return bytes;
}

void Tape::refill(Region& region) {
  mode_ = Mode::refill;
  cursor_ = region.first;
  keeps_scratch_ = region.scratch;
  const MemoryName name("again");
  if (region.host != nullptr) {
    if (!region.input.value.defined()) fetch(region);
    region.host->wait();
  }
  region.forward(region.input);
  region.input.value = Tensor();
  QLAB_CHECK(cursor_ == region.last, "recompute ran {} of {} operations", cursor_ - region.first,
             region.last - region.first);
  mode_ = Mode::normal;
}

void Tape::accumulate(int id, const Tensor& g) {
  if (id < 0 || !g.defined()) return;
  Tensor& sum = gradients_[id];
  if (!sum.defined())
    sum = g;
  else if (sum.unique())
    add_inplace(sum, g);
  else
    sum = add(sum, g);
}

void Tape::backward(const Variable& output, const Tensor& g) {
  QLAB_CHECK(output.requires_grad(), "nothing that trains leads to this output");
  gradients_.assign(variables_, Tensor());
  gradients_[output.id] = g;
  const MemoryName backward("backward");
  size_t first = 0;  // of the region at work
  int64_t most = 0;  // that its slots held
  while (!nodes_.empty()) {
    if (!regions_.empty() && regions_.back().last == nodes_.size()) {
      Region region = std::move(regions_.back());
      regions_.pop_back();
      refill(region);
      first = region.first, most = bytes_kept(first);
    }
    // The input of the next region comes while this one is at work, in room that it has given back:
    // where it holds the most, at its beginning, one more block would be at the step's peak.
    if (most > 0 && !regions_.empty() && regions_.back().host != nullptr &&
        !regions_.back().input.value.defined() && 2 * bytes_kept(first) <= most)
      fetch(regions_.back());
    Node& node = nodes_.back();
    Tensor incoming = std::move(gradients_[node.output_]);
    gradients_[node.output_] = Tensor();
    if (incoming.defined() || node.output_ == output.id) {
      if (node.sum_ == Sum::own && node.needs(0)) {
        node.collected_ = std::move(gradients_[node.inputs_[0]]);
        gradients_[node.inputs_[0]] = Tensor();
      }
      const std::string place = std::move(node.place_);
      const MemoryName name(place);
      std::vector<Tensor> results = node.backward_(incoming, node);
      incoming = Tensor();
      const std::vector<int> inputs = std::move(node.inputs_);
      nodes_.pop_back();  // frees its slots before sums are formed
      for (size_t i = 0; i < inputs.size(); ++i) {
        accumulate(inputs[i], results[i]);
        results[i] = Tensor();
      }
    } else {
      nodes_.pop_back();
    }
  }
}

const Tensor& Tape::gradient(const Variable& input) const {
  QLAB_CHECK(input.requires_grad() && gradients_.at(input.id).defined(), "no gradient was formed");
  return gradients_[input.id];
}

std::vector<std::pair<std::string_view, int64_t>> Tape::slots() const {
  std::vector<std::pair<std::string_view, int64_t>> held;
  for (const Node& node : nodes_)
    for (const Slot& slot : node.slots_)
      if (slot.value.defined()) held.emplace_back(slot.name, slot.value.bytes());
  return held;
}

}  // namespace qlab
