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

/// Bytes held, by category, now and at the moment of the highest total.
struct MemoryAccount {
  std::array<int64_t, category_count> current{}, at_peak{};
  int64_t total = 0, peak = 0;
};
/// The account of a device. Meta devices have their own, so that a dry run can be read off.
const MemoryAccount& memory_account(Device device);
void reset_peak(Device device);

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
  std::array<int64_t, category_count> at_peak{};
};

/// Records every meta allocation made in its scope, on this thread, and lays them out as they come
/// (best fit); finish() ends the recording.
class PlanRecorder {
 public:
  PlanRecorder();
  ~PlanRecorder();
  StepPlan finish();
};

/// A block of device memory from which steps are served. Grows between steps, never inside one.
class StepMemory {
 public:
  explicit StepMemory(Device device);
  ~StepMemory();
  /// Makes room for `plan` or throws OutOfMemory naming what was asked and what is held.
  void reserve(const StepPlan& plan);
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
  std::array<int64_t, category_count> held_{};
};

/// A block of memory, freed when the last tensor that views it goes. `data` is null on meta.
class Storage {
 public:
  static std::shared_ptr<Storage> allocate(int64_t bytes, Device device);
  /// Memory that someone else owns, for example a mapped file; `owner` keeps it alive.
  static std::shared_ptr<Storage> wrap(void* data, int64_t bytes, std::shared_ptr<void> owner);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  enum class Source : uint8_t { heap, step, recorded, meta, external };
  Storage() = default;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  Device device_;
  Category category_ = Category::activations;
  Source source_ = Source::heap;
  int64_t index_ = 0;  // in the plan, for recorded storage
  std::shared_ptr<void> owner_;
};

/// "0 B", "512 B", "1.50 MB", "5.70 GB": powers of ten.
std::string format_bytes(int64_t bytes);
/// Bytes of "512", "14.3GB" (powers of ten) or "24GiB" (powers of two), or nothing.
std::optional<int64_t> parse_bytes(std::string_view text);

}  // namespace qlab
