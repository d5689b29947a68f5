// The one allocator. Every byte has an owner: each allocation carries a category, a memory table is
// the allocator's own account, and a step's allocations come from a reservation planned on meta.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"

namespace qlab {

enum class Category : uint8_t {
  weights,
  constants,
  adapters,
  gradients,
  optimizer,
  activations,
  workspace
};
inline constexpr int category_count = 7;
const char* name_of(Category category);

/// Tags every allocation made in its scope, on this thread. The default is activations.
class MemoryTag {
 public:
  explicit MemoryTag(Category category);
  ~MemoryTag();
  MemoryTag(const MemoryTag&) = delete;
  MemoryTag& operator=(const MemoryTag&) = delete;

 private:
  Category previous_;
};

/// Names what is allocated on meta in its scope, on this thread: "model.layers.3.mlp.up_proj".
/// Scopes nest, their names joined by a blank. `name` must outlive the scope.
class MemoryName {
 public:
  explicit MemoryName(std::string_view name, int64_t index = -1);
  ~MemoryName();
  MemoryName(const MemoryName&) = delete;
  MemoryName& operator=(const MemoryName&) = delete;
  /// Of the innermost scope, all around it included.
  static std::string path();

 private:
  std::string_view name_;
  int64_t index_;
  const MemoryName* outer_;
};
/// path() while a named plan is being recorded, otherwise "".
std::string planned_path();

/// Bytes by category.
using CategoryBytes = std::array<int64_t, category_count>;
int64_t sum(const CategoryBytes& bytes);

/// Bytes held, by category, now and at the moment of the highest total.
struct MemoryAccount {
  CategoryBytes current{}, at_peak{};
  int64_t total = 0, peak = 0;
};
/// The account of a device. Meta devices have their own, so that a dry run can be read off.
const MemoryAccount& memory_account(Device device);
void reset_peak(Device device);

/// No more than `bytes` in all are handed out on the device from now on, as if it had no more.
/// Returns the limit until now, the largest number where there was none.
int64_t limit_memory(Device device, int64_t bytes);
/// What can still be allocated: free on the device and within its limit. A meta device has what
/// its limit leaves.
int64_t available_memory(Device device);

/// Something that can give memory of its device back for a while, as an optimizer's states that
/// wait on the host. Asked before an allocation outside of steps is refused; on meta where it would
/// be.
class Evictable {
 public:
  /// Frees at least `bytes` where it can. Returns what it freed; 0 when nothing is left to free.
  virtual int64_t evict(int64_t bytes) = 0;

 protected:
  ~Evictable() = default;
};
/// The one added last is asked first.
void add_evictable(Device device, Evictable* who);
void remove_evictable(Device device, Evictable* who);

/// A tensor on paper.
struct LiveTensor {
  std::string name;  // where it belongs: "lm_head", "backward model.layers.3 swiglu.gate_up"
  std::string kind;  // "bfloat16 [512, 128256]"
  Category category;
  int64_t bytes;
};
/// What lives on a meta device outside of steps, in the order of allocation.
std::vector<LiveTensor> live_tensors(Device meta);

/// Offsets for the allocations of one step of one shape, from a dry run on the meta device.
/// Allocation number i of the real step gets `offset[i]`; events come in the same order because the
/// same code runs and shapes never depend on data.
struct StepPlan {
  struct Block {
    int64_t bytes, offset;
    Category category;
  };
  std::vector<Block> blocks;
  int64_t bytes = 0;  // size of the reservation
  CategoryBytes at_peak{};

  /// What a block is: where it is made, the tape's slot that keeps it or "", dtype and shape.
  struct Label {
    std::string place, slot, kind;
  };
  std::vector<Label> labels;    // of the blocks of a named plan
  std::vector<int32_t> events;  // i where block i is taken, ~i where it is given back

  /// Lays the blocks out anew, the longest-lived first, or the largest, each in the tightest gap
  /// that its lifetime leaves; keeps the layout that needs fewest bytes. Not for a plan that has
  /// run.
  void pack();
  bool packed = false;

  /// The most that was live while one place was at work.
  struct Moment {
    std::string place;
    CategoryBytes bytes;
  };
  // The following need a named plan.
  std::vector<Moment> course() const;
  std::vector<LiveTensor> live_at_peak() const;
  std::string peak_place() const;
};

/// Records every meta allocation made in its scope, on this thread, and lays them out as they come
/// (best fit); finish() ends the recording. `named` keeps names too.
class PlanRecorder {
 public:
  explicit PlanRecorder(bool named = false);
  ~PlanRecorder();
  StepPlan finish();
};

/// A block of device memory from which steps are served. Grows between steps, never inside one.
class StepMemory {
 public:
  explicit StepMemory(Device device);
  ~StepMemory();
  /// Makes room for `plan` or throws OutOfMemory naming what was asked and what is held. A plan
  /// that is larger than what is there is packed first: with gaps left by chance, one of fewer
  /// tokens could need more than the largest.
  void reserve(StepPlan& plan);
  int64_t bytes() const { return bytes_; }
  /// Where it lies: changes when it grows.
  const void* base() const { return base_; }
  /// False where every tensor is allocated by itself (QLAB_PLAIN_ALLOC), at changing addresses.
  static bool planned();

  /// While alive, allocations on the device come from the plan's offsets. A step whose allocations
  /// differ from the plan is a bug and throws.
  class Scope {
   public:
    Scope(StepMemory& memory, const StepPlan& plan);
    ~Scope();
  };

 private:
  Device device_;
  void* base_ = nullptr;
  int64_t bytes_ = 0;
  CategoryBytes held_{};
};

/// A block of memory, freed when the last tensor that views it goes. `data` is null on meta, where
/// nothing is held but accounts are kept.
class Storage {
 public:
  static std::shared_ptr<Storage> allocate(int64_t bytes, Device device);
  /// Memory that someone else owns, for example a mapped file; `owner` keeps it alive.
  static std::shared_ptr<Storage> wrap(void* data, int64_t bytes, std::shared_ptr<void> owner,
                                       Device device = Device::cpu());
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  /// What it is for from now on: a tensor that was read becomes a weight. Not in a step.
  void set_category(Category category);
  /// Whether the account on meta wants to know what this is.
  bool wants_kind() const;
  void set_kind(std::string kind);
  /// Names the tape's slot that keeps a recorded block; the first name stays.
  void set_slot(std::string_view slot);

 private:
  enum class Source : uint8_t { heap, step, recorded, meta, external };
  Storage() = default;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Device device_;
  Category category_ = Category::activations;
  Source source_ = Source::heap;
  int64_t index_ = 0;  // in the plan, for recorded storage; otherwise on meta the running number
  std::shared_ptr<void> owner_;
};

/// "0 B", "512 B", "1.50 MB", "5.70 GB": powers of ten.
std::string format_bytes(int64_t bytes);
/// Bytes of "512", "14.3GB" (powers of ten) or "24GiB" (powers of two), or nothing.
std::optional<int64_t> parse_bytes(std::string_view text);

}  // namespace qlab
