#include "core/memory.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <mutex>

#include "core/error.h"

namespace qlab {
namespace {

constexpr int64_t alignment = 256;
int64_t align(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

struct FreeList {
  std::map<int64_t, int64_t> ranges;  // offset -> bytes, not adjacent
  int64_t end = 0;

  int64_t take(int64_t bytes) {
    auto best = ranges.end();
    for (auto it = ranges.begin(); it != ranges.end(); ++it)
      if (it->second >= bytes && (best == ranges.end() || it->second < best->second)) best = it;
    if (best == ranges.end()) {
      // Extend the last range when it touches the end, so that the reservation grows least.
      int64_t offset = end;
      if (!ranges.empty()) {
        auto last = std::prev(ranges.end());
        if (last->first + last->second == end) offset = last->first, ranges.erase(last);
      }
      end = offset + bytes;
      return offset;
    }
    const auto [offset, size] = *best;
    ranges.erase(best);
    if (size > bytes) ranges[offset + bytes] = size - bytes;
    return offset;
  }
  void give(int64_t offset, int64_t bytes) {
    auto [it, fresh] = ranges.emplace(offset, bytes);
    auto next = std::next(it);
    if (next != ranges.end() && it->first + it->second == next->first) {
      it->second += next->second;
      ranges.erase(next);
    }
    if (it != ranges.begin()) {
      auto previous = std::prev(it);
      if (previous->first + previous->second == it->first) {
        previous->second += it->second;
        ranges.erase(it);
      }
    }
  }
};

struct Recording {
  StepPlan plan;
  FreeList free;
  MemoryAccount account;
};

struct ActiveStep {
  Device device;
  char* base = nullptr;
  const StepPlan* plan = nullptr;
  size_t next = 0;
};

thread_local Category current_category = Category::activations;
thread_local std::shared_ptr<Recording> recording;
thread_local ActiveStep active_step;

std::mutex account_mutex;
struct DeviceLess {
  bool operator()(const Device& a, const Device& b) const {
    return std::tuple(a.type, a.target, a.index) < std::tuple(b.type, b.target, b.index);
  }
};
std::map<Device, MemoryAccount, DeviceLess> accounts;

void charge(MemoryAccount& account, Category category, int64_t bytes) {
  account.current[static_cast<int>(category)] += bytes;
  account.total += bytes;
  if (account.total > account.peak) {
    account.peak = account.total;
    account.at_peak = account.current;
  }
}
void charge(Device device, Category category, int64_t bytes) {
  const std::lock_guard lock(account_mutex);
  charge(accounts[device], category, bytes);
}

bool plain_mode() {
  static const bool plain = std::getenv("QLAB_PLAIN_ALLOC") != nullptr;
  return plain;
}

int64_t available_host_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  int64_t kib = 0;
  while (file >> key >> kib >> unit)
    if (key == "MemAvailable:") return kib * 1024;
  return INT64_MAX;
}

void* allocate_on(Device device, int64_t bytes) {
  if (device.is_cuda()) return cuda::allocate(static_cast<size_t>(bytes), device.index);
  // Linux hands out more than it has; ask before a large block, so that the error is ours.
  if (bytes > (int64_t{1} << 28) && bytes > available_host_bytes()) return nullptr;
  return std::aligned_alloc(alignment, static_cast<size_t>(bytes));
}

void release_on(Device device, void* data) {
  if (device.is_cuda())
    cuda::release(data, device.index);
  else
    std::free(data);
}

[[noreturn]] void out_of_memory(Device device, int64_t bytes, const char* what) {
  std::string held;
  for (int i = 0; i < category_count; ++i)
    if (const int64_t n = memory_account(device).current[i]; n > 0)
      held += fmt::format("{}{} {}", held.empty() ? "" : ", ", name_of(static_cast<Category>(i)),
                          format_bytes(n));
  const int64_t free = device.is_cuda()
                           ? static_cast<int64_t>(cuda::memory_info(device.index).free_bytes)
                           : available_host_bytes();
  throw OutOfMemory(fmt::format(
      "out of memory on {}: {} asked for {}, {} free; held: {}.\n"
      "Set train.recompute: full, a smaller train.batch_size (with more train.grad_accum), "
      "data.seq_len or parallel.trials_per_gpu, or quant.type: nf4.",
      device.str(), what, format_bytes(bytes), format_bytes(free),
      held.empty() ? "nothing" : held));
}

}  // namespace

const char* name_of(Category category) {
  constexpr const char* names[] = {"weights",   "constants",   "adapters", "gradients",
                                   "optimizer", "activations", "workspace"};
  return names[static_cast<int>(category)];
}

MemoryTag::MemoryTag(Category category) : previous_(current_category) {
  current_category = category;
}
MemoryTag::~MemoryTag() { current_category = previous_; }

const MemoryAccount& memory_account(Device device) {
  const std::lock_guard lock(account_mutex);
  return accounts[device];
}

void reset_peak(Device device) {
  const std::lock_guard lock(account_mutex);
  MemoryAccount& account = accounts[device];
  account.peak = account.total;
  account.at_peak = account.current;
}

PlanRecorder::PlanRecorder() {
  QLAB_CHECK(!recording, "a memory plan is already being recorded");
  recording = std::make_shared<Recording>();
}
PlanRecorder::~PlanRecorder() { recording.reset(); }

StepPlan PlanRecorder::finish() {
  StepPlan plan = std::move(recording->plan);
  plan.bytes = recording->free.end;
  plan.at_peak = recording->account.at_peak;
  return plan;
}

StepMemory::StepMemory(Device device) : device_(device) {}

StepMemory::~StepMemory() {
  if (base_ == nullptr) return;
  for (int i = 0; i < category_count; ++i) charge(device_, static_cast<Category>(i), -held_[i]);
  release_on(device_, base_);
}

void StepMemory::reserve(const StepPlan& plan) {
  if (plain_mode() || device_.is_meta() || plan.bytes <= bytes_) return;
  if (base_ != nullptr) {
    if (device_.is_cuda()) cuda::synchronize();
    for (int i = 0; i < category_count; ++i) charge(device_, static_cast<Category>(i), -held_[i]);
    release_on(device_, base_);
    base_ = nullptr, bytes_ = 0, held_ = {};
  }
  base_ = allocate_on(device_, plan.bytes);
  if (base_ == nullptr) out_of_memory(device_, plan.bytes, "a step");
  bytes_ = plan.bytes;
  // What fragmentation adds to the live bytes at the peak counts as workspace.
  int64_t rest = plan.bytes;
  for (int i = 0; i < category_count; ++i) rest -= held_[i] = plan.at_peak[i];
  held_[static_cast<int>(Category::workspace)] += rest;
  for (int i = 0; i < category_count; ++i) charge(device_, static_cast<Category>(i), held_[i]);
}

bool StepMemory::planned() { return !plain_mode(); }

StepMemory::Scope::Scope(StepMemory& memory, const StepPlan& plan) {
  QLAB_CHECK(active_step.plan == nullptr, "steps do not nest");
  if (plain_mode() || memory.device_.is_meta()) return;
  QLAB_CHECK(plan.bytes <= memory.bytes_, "a step runs without its reservation");
  active_step = {memory.device_, static_cast<char*>(memory.base_), &plan, 0};
}
StepMemory::Scope::~Scope() { active_step = {}; }

std::shared_ptr<Storage> Storage::allocate(int64_t bytes, Device device) {
  auto storage = std::shared_ptr<Storage>(new Storage);
  storage->bytes_ = std::max<int64_t>(align(bytes), alignment);
  storage->device_ = device;
  storage->category_ = current_category;
  bytes = storage->bytes_;
  if (device.is_meta()) {
    storage->source_ = Source::meta;
    if (recording) {
      storage->source_ = Source::recorded;
      storage->owner_ = recording;
      storage->index_ = static_cast<int64_t>(recording->plan.blocks.size());
      recording->plan.blocks.push_back({bytes, recording->free.take(bytes), current_category});
      charge(recording->account, current_category, bytes);
    }
    charge(device, current_category, bytes);
  } else if (active_step.plan != nullptr && active_step.device == device) {
    QLAB_CHECK(active_step.next < active_step.plan->blocks.size() &&
                   active_step.plan->blocks[active_step.next].bytes == bytes,
               "allocation {} of a step has {} bytes and is not in its plan", active_step.next,
               bytes);
    storage->source_ = Source::step;
    storage->data_ = active_step.base + active_step.plan->blocks[active_step.next++].offset;
  } else {
    storage->source_ = Source::heap;
    storage->data_ = allocate_on(device, bytes);
    if (storage->data_ == nullptr) {
      storage->source_ = Source::external;  // nothing to release
      out_of_memory(device, bytes, name_of(current_category));
    }
    charge(device, current_category, bytes);
  }
  return storage;
}

std::shared_ptr<Storage> Storage::wrap(void* data, int64_t bytes, std::shared_ptr<void> owner) {
  auto storage = std::shared_ptr<Storage>(new Storage);
  storage->data_ = data;
  storage->bytes_ = bytes;
  storage->source_ = Source::external;
  storage->owner_ = std::move(owner);
  return storage;
}

Storage::~Storage() {
  switch (source_) {
    case Source::heap:
      charge(device_, category_, -bytes_);
      release_on(device_, data_);
      break;
    case Source::recorded: {
      auto& state = *static_cast<Recording*>(owner_.get());
      if (index_ < static_cast<int64_t>(state.plan.blocks.size())) {  // not finished yet
        state.free.give(state.plan.blocks[index_].offset, bytes_);
        charge(state.account, category_, -bytes_);
      }
      charge(device_, category_, -bytes_);
      break;
    }
    case Source::meta:
      charge(device_, category_, -bytes_);
      break;
    case Source::step:
    case Source::external:
      break;
  }
}

std::string format_bytes(int64_t bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 999.5 && unit < 4) value /= 1000, ++unit;
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, units[unit]);
}

std::optional<int64_t> parse_bytes(std::string_view text) {
  double value = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || !(value >= 0)) return {};
  std::string_view unit(rest, static_cast<size_t>(text.data() + text.size() - rest));
  while (unit.starts_with(' ')) unit.remove_prefix(1);
  const bool binary = unit.size() == 3 && unit[1] == 'i';
  if (!unit.empty() && unit != "B") {
    constexpr std::string_view prefixes = "kMGT";
    const size_t power = prefixes.find(unit[0] == 'K' ? 'k' : unit[0]);
    if (power == prefixes.npos || !unit.ends_with('B') || unit.size() != (binary ? 3 : 2))
      return {};
    value *= std::pow(binary ? 1024.0 : 1000.0, static_cast<double>(power + 1));
  }
  if (!(value < 9e18)) return {};
  return static_cast<int64_t>(std::llround(value));
}

}  // namespace qlab
