// Reverse-mode differentiation. The tape is a vector of nodes in the order in which they were made;
// backward walks it in reverse. What backward needs is kept in named slots, each with a policy, so
// that a planner can choose what to hold and what to compute again.
#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/host_slots.h"
#include "core/tensor.h"

namespace qlab {

/// A tensor on the tape. id < 0: no gradient flows to it. Whoever forms its gradient leaves room
/// for `tail` more columns (Tensor::with_tail): a linear layer with folded adapters works in them.
struct Variable {
  Tensor value;
  int id = -1;
  int64_t tail = 0;
  bool requires_grad() const { return id >= 0; }
};

/// keep: the slot's tensor lives until its backward has run. recompute: inside a recompute region
/// it is dropped at once and filled again when backward reaches the region.
enum class SlotPolicy : uint8_t { keep, recompute };

struct Slot {
  const char* name;  // "rms_norm.x"
  Tensor value;
  SlotPolicy policy = SlotPolicy::recompute;  // unless the tape has another for that name
};

/// Who adds a node's first result to the gradient that other uses of its first input have left:
/// the tape, or the node's own backward (Node::collected).
enum class Sum : uint8_t { tape, own };

class Node {
 public:
  /// The saved tensor of that name.
  const Tensor& saved(std::string_view name) const;
  /// The same, no longer the node's: its memory is free for what its backward allocates once the
  /// caller drops it.
  Tensor take(std::string_view name);
  /// What keep_scratch() left for this backward, or nothing.
  Tensor take_scratch() { return std::exchange(scratch_, Tensor()); }
  /// Whether the gradient of input i is wanted.
  bool needs(size_t i) const { return inputs_[i] >= 0; }
  /// With Sum::own: the gradient of input 0 collected so far, undefined when there is none. The
  /// first result replaces it, so that a kernel adds it on the way.
  const Tensor& collected() const { return collected_; }

 private:
  friend class Tape;
  size_t find(std::string_view name) const;
  using Backward = std::function<std::vector<Tensor>(const Tensor& g, Node& node)>;
  const char* op_ = "";
  std::string place_;  // of the forward pass, in a named plan
  std::vector<int> inputs_;
  int output_ = -1;
  std::vector<Slot> slots_;
  Backward backward_;
  Sum sum_ = Sum::tape;
  Tensor scratch_;
  bool read_again_ = true;  // its result, when its region runs once more
  Tensor collected_;
};

class Tape {
 public:
  using Backward = Node::Backward;
  using Policy = std::function<SlotPolicy(std::string_view slot)>;

  /// A tape that does not record computes values only (evaluation, generation).
  explicit Tape(bool recording = true) : recording_(recording) {}
  /// Which slots a recompute region keeps; what each of them says unless set.
  void set_policy(Policy policy) { policy_ = std::move(policy); }

  /// A tensor that is given; with requires_grad its gradient can be read by gradient().
  Variable input(Tensor value, bool requires_grad = false);

  /// The result of an operation. `backward` returns one gradient per input; those that are not
  /// needed may be undefined. `trains`: the operation has parameters of its own, whose gradients
  /// its backward accumulates, so it is recorded even when no input requires a gradient.
  Variable record(const char* op, Tensor result, const std::vector<Variable>& inputs,
                  std::vector<Slot> slots, Backward backward, bool trains = false,
                  Sum sum = Sum::tape);

  /// Runs `forward` and keeps only its input; its slots are filled again, by running it once more,
  /// when backward needs them. Bits do not change: the same operations run on the same values.
  /// With `host` the input itself waits there, in the block of the region's number; it leaves
  /// beside the region's own work, and comes back beside the backward pass of the region behind;
  /// no slot is kept then.
  /// With `scratch` the second run keeps for backward what operations offer by keep_scratch().
  Variable recompute(const std::function<Variable(const Variable&)>& forward, const Variable& input,
                     HostSlots* host = nullptr, bool scratch = false);
  /// The next operation that is recorded would make the same scratch again in its backward.
  void keep_scratch(const Tensor& scratch) {
    if (mode_ == Mode::refill && keeps_scratch_) next_scratch_ = scratch;
  }

  /// False where a region is run once more and nobody reads the result of the next operation, which
  /// may then stay unwritten: the region's last, and what only operations read that keep nothing
  /// and whose result nobody reads either. To be asked by an operation that will be recorded.
  bool result_wanted() {
    if (std::exchange(next_unwanted_, false)) return false;
    return mode_ != Mode::refill || nodes_.at(cursor_).read_again_;
  }
  /// Whether of the slots of the next operation only those that say `keep` stay.
  bool keeps_few() const { return mode_ == Mode::drop && keeps_slots_; }
  /// Where a region is run once more: what the slot of the next operation that is recorded has
  /// kept from the first run, or nothing.
  Tensor kept(std::string_view slot) const;
  /// The next operation that asks is told that nobody reads its result.
  void leave_next_result() { next_unwanted_ = true; }

  /// Walks back from `output`, whose gradient is `g` (undefined for a loss that carries its own).
  /// Frees each node as it goes.
  void backward(const Variable& output, const Tensor& g = {});
  const Tensor& gradient(const Variable& input) const;

  /// Bytes of the slots now held, by name: what the planner chooses from.
  std::vector<std::pair<std::string_view, int64_t>> slots() const;

 private:
  struct Region {
    size_t first, last;  // nodes
    Variable input;
    std::function<Variable(const Variable&)> forward;
    HostSlots* host;
    bool scratch;
    size_t slot;
    Shape shape;  // of the input, where it waits on the host
    DType dtype;
    Device device;
  };
  enum class Mode : uint8_t { normal, drop, refill };

  void find_readers(size_t first);
  void refill(Region& region);
  static void fetch(Region& region);
  int64_t bytes_kept(size_t first) const;
  void accumulate(int id, const Tensor& g);

  bool recording_;
  Policy policy_;
  std::vector<Node> nodes_;
  std::vector<Region> regions_;
  std::vector<Tensor> gradients_;  // by variable id
  int variables_ = 0;
  Mode mode_ = Mode::normal;
  bool next_unwanted_ = false;
  bool keeps_slots_ = true;     // of the region that is run
  bool keeps_scratch_ = false;  // of the region that is run once more
  Tensor next_scratch_;
  size_t cursor_ = 0;  // next node to refill
};

}  // namespace qlab
