#include "core/memory.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>

#include "core/arena.h"
#include "core/error.h"
#include "core/host_memory.h"
#include "core/host_pages.h"
#include "core/layout.h"

namespace qlab {
namespace {

constexpr int64_t alignment = 256;
constexpr int64_t large_block = int64_t{16} << 20;  // of the host: rounded up to 2 MiB
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
  bool named = false;
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

struct ActiveArena {
  Device device;
  std::shared_ptr<char> block;  // null on meta
  int64_t bytes = 0, taken = 0;
};

thread_local Category current_category = Category::activations;
thread_local std::shared_ptr<Recording> recording;
thread_local ActiveStep active_step;
thread_local std::optional<ActiveArena> active_arena;

std::mutex account_mutex;
struct DeviceLess {
  bool operator()(const Device& a, const Device& b) const {
    return std::tuple(a.type, a.target, a.index) < std::tuple(b.type, b.target, b.index);
  }
};
std::map<Device, MemoryAccount, DeviceLess> accounts;
std::map<Device, int64_t, DeviceLess> limits;
std::map<int64_t, std::pair<Device, LiveTensor>> live_on_meta;  // by running number
int64_t meta_count = 0;
std::vector<std::pair<Device, Evictable*>> evictables;
thread_local const MemoryName* innermost_name = nullptr;

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

int64_t left_of_limit(Device device) {
  const std::lock_guard lock(account_mutex);
  const auto limit = limits.find(device);
  return limit == limits.end() ? INT64_MAX : limit->second - accounts[device].total;
}

/// Has others give back what `bytes` lack; false when they have nothing more.
bool evict_for(Device device, int64_t bytes) {
  std::vector<Evictable*> asked;
  {
    const std::lock_guard lock(account_mutex);
    for (auto it = evictables.rbegin(); it != evictables.rend(); ++it)
      if (it->first == device) asked.push_back(it->second);
  }
  if (asked.empty()) return false;
  int64_t missing = bytes - available_memory(device), freed = 0;
  if (missing <= 0) missing = bytes;  // enough in all, but not in one piece
  for (Evictable* who : asked)
    if (freed < missing) freed += who->evict(missing - freed);
  return freed > 0;
}

void* try_to_allocate(Device device, int64_t bytes) {
  if (bytes > left_of_limit(device)) return nullptr;
  if (device.is_cuda()) return cuda::allocate(static_cast<size_t>(bytes), device.index);
  // Linux hands out more than it has; ask before a large block, so that the error is ours.
  if (bytes > (int64_t{1} << 28) && bytes > available_host_memory()) return nullptr;
  const auto size = static_cast<size_t>(bytes);
  return bytes < large_block ? std::aligned_alloc(alignment, size) : allocate_pages(size);
}

void* allocate_on(Device device, int64_t bytes) {
  void* data = try_to_allocate(device, bytes);
  while (data == nullptr && evict_for(device, bytes)) data = try_to_allocate(device, bytes);
  return data;
}

/// What allocate_on() would have others give back.
void evict_on_paper(Device meta, int64_t bytes) {
  while (bytes > left_of_limit(meta) && evict_for(meta, bytes)) continue;
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
  const int64_t free = available_memory(device);
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

MemoryName::MemoryName(std::string_view name, int64_t index)
    : name_(name), index_(index), outer_(innermost_name) {
  innermost_name = this;
}
MemoryName::~MemoryName() { innermost_name = outer_; }

std::string MemoryName::path() {
  std::string path;
  for (const MemoryName* n = innermost_name; n != nullptr; n = n->outer_) {
    if (n->name_.empty()) continue;
    std::string own(n->name_);
    if (n->index_ >= 0) own += std::to_string(n->index_);
    path = path.empty() ? own : own + " " + path;
  }
  return path;
}

std::string planned_path() {
  return recording && recording->named ? MemoryName::path() : std::string();
}

int64_t sum(const CategoryBytes& bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
}

int64_t limit_memory(Device device, int64_t bytes) {
  const std::lock_guard lock(account_mutex);
  const auto [entry, created] = limits.try_emplace(device, std::numeric_limits<int64_t>::max());
  return std::exchange(entry->second, bytes);
}

int64_t available_memory(Device device) {
  const int64_t within = std::max<int64_t>(left_of_limit(device), 0);
  if (device.is_meta()) return within;
  return std::min(within, device.is_cuda()
                              ? static_cast<int64_t>(cuda::memory_info(device.index).free_bytes)
                              : available_host_memory());
}

void add_evictable(Device device, Evictable* who) {
  const std::lock_guard lock(account_mutex);
  evictables.emplace_back(device, who);
}
void remove_evictable(Device device, Evictable* who) {
  const std::lock_guard lock(account_mutex);
  std::erase(evictables, std::pair(device, who));
}

std::vector<LiveTensor> live_tensors(Device meta) {
  const std::lock_guard lock(account_mutex);
  std::vector<LiveTensor> live;
  for (const auto& [number, entry] : live_on_meta)
    if (entry.first == meta) live.push_back(entry.second);
  return live;
}

namespace {

/// Plays a named plan's events: `see(i, live)` after block i was taken.
template <class See>
void play(const StepPlan& plan, See&& see) {
  CategoryBytes live{};
  for (const int32_t event : plan.events) {
    const int32_t i = event < 0 ? ~event : event;
    const StepPlan::Block& block = plan.blocks[static_cast<size_t>(i)];
    live[static_cast<int>(block.category)] += event < 0 ? -block.bytes : block.bytes;
    if (event >= 0) see(i, live);
  }
}

/// The block that made the peak; -1 of an empty plan.
int32_t peak_block(const StepPlan& plan) {
  int64_t peak = 0;
  int32_t block = -1;
  play(plan, [&](int32_t i, const CategoryBytes& live) {
    if (const int64_t total = sum(live); total > peak) peak = total, block = i;
  });
  return block;
}

}  // namespace

void StepPlan::pack() {
  if (std::exchange(packed, true)) return;
  const auto end = static_cast<int32_t>(events.size());
  std::vector<int32_t> taken(blocks.size()), given(blocks.size(), end);
  for (int32_t e = 0; e < end; ++e) {
    const int32_t event = events[static_cast<size_t>(e)];
    (event >= 0 ? taken[static_cast<size_t>(event)] : given[static_cast<size_t>(~event)]) = e;
  }
  const auto life = [&](size_t i) -> int64_t { return given[i] - taken[i]; };
  const auto size = [&](size_t i) { return blocks[i].bytes; };
  const auto try_order = [&](const auto& key) {
    if (bytes == sum(at_peak)) return;  // no gap is left
    std::vector<size_t> order(blocks.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return key(a) > key(b); });
    Layout layout(end);
    std::vector<int64_t> offsets(blocks.size());
    for (const size_t i : order) offsets[i] = layout.place(blocks[i].bytes, taken[i], given[i]);
    if (layout.bytes() >= bytes) return;
    bytes = layout.bytes();
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i].offset = offsets[i];
  };
  try_order(life);
  try_order(size);
}

std::vector<StepPlan::Moment> StepPlan::course() const {
  std::vector<Moment> moments;
  play(*this, [&](int32_t i, const CategoryBytes& live) {
    const std::string& place = labels[static_cast<size_t>(i)].place;
    if (moments.empty() || moments.back().place != place)
      moments.push_back({place, live});
    else if (sum(live) > sum(moments.back().bytes))
      moments.back().bytes = live;
  });
  return moments;
}

std::vector<LiveTensor> StepPlan::live_at_peak() const {
  const int32_t peak = peak_block(*this);
  std::vector<bool> live(blocks.size());
  for (const int32_t event : events) {
    live[static_cast<size_t>(event < 0 ? ~event : event)] = event >= 0;
    if (event == peak) break;
  }
  std::vector<LiveTensor> tensors;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (!live[i]) continue;
    const auto& [place, slot, kind] = labels[i];
    tensors.push_back(
        {slot.empty() ? place : place + " " + slot, kind, blocks[i].category, blocks[i].bytes});
  }
  return tensors;
}

std::string StepPlan::peak_place() const {
  const int32_t peak = peak_block(*this);
  return peak < 0 ? "" : labels[static_cast<size_t>(peak)].place;
}

PlanRecorder::PlanRecorder(bool named) {
  QLAB_CHECK(!recording, "a memory plan is already being recorded");
  recording = std::make_shared<Recording>();
  recording->named = named;
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
  for (int i = 0; i < category_count; ++i) charge(device_, static_cast<Category>(i), -held_[i]);
  if (base_ != nullptr) release_on(device_, base_);
}

void StepMemory::reserve(StepPlan& plan) {
  if (plain_mode() || plan.bytes <= bytes_) return;
  plan.pack();
  if (plan.bytes <= bytes_) return;
  if (bytes_ > 0) {
    if (device_.is_cuda()) cuda::synchronize();
    for (int i = 0; i < category_count; ++i) charge(device_, static_cast<Category>(i), -held_[i]);
    if (base_ != nullptr) release_on(device_, base_);
    base_ = nullptr, bytes_ = 0, held_ = {};
  }
  if (device_.is_meta()) {
    evict_on_paper(device_, plan.bytes);
  } else {
    base_ = allocate_on(device_, plan.bytes);
    if (base_ == nullptr) out_of_memory(device_, plan.bytes, "a step");
  }
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

Arena::Arena(Device device, int64_t bytes) {
  QLAB_CHECK(!active_arena, "arenas do not nest");
  active_arena.emplace(ActiveArena{device, nullptr, bytes, 0});
  if (device.is_meta()) active_arena->bytes = std::numeric_limits<int64_t>::max();
  if (device.is_meta() || bytes == 0 || plain_mode()) return;
  if (void* data = try_to_allocate(device, bytes))
    active_arena->block = {static_cast<char*>(data),
                           [=](char* block) { release_on(device, block); }};
}
Arena::~Arena() { active_arena.reset(); }
int64_t Arena::taken() const { return active_arena->taken; }

namespace {

/// Where in the arena the next `bytes` lie, with its block; nothing where they are not of its kind.
std::shared_ptr<char> place_in_arena(Device device, int64_t bytes) {
  if (!active_arena || active_arena->device != device) return {};
  if (current_category != Category::weights && current_category != Category::constants) return {};
  if (!device.is_meta() && !active_arena->block) return {};
  if (bytes > active_arena->bytes - active_arena->taken) return {};
  const int64_t offset = std::exchange(active_arena->taken, active_arena->taken + bytes);
  if (device.is_meta()) return {};
  return {active_arena->block, active_arena->block.get() + offset};
}

}  // namespace

std::shared_ptr<Storage> Storage::allocate(int64_t bytes, Device device) {
  auto storage = std::shared_ptr<Storage>(new Storage);
  storage->source_ = Source::external;  // nothing to release until it is known from where
  storage->bytes_ = std::max<int64_t>(align(bytes), alignment);
  storage->device_ = device;
  storage->category_ = current_category;
  bytes = storage->bytes_;
  if (device.is_meta()) {
    if (recording) {
      storage->source_ = Source::recorded;
      storage->owner_ = recording;
      storage->index_ = static_cast<int64_t>(recording->plan.blocks.size());
      recording->plan.blocks.push_back({bytes, recording->free.take(bytes), current_category});
      recording->plan.events.push_back(static_cast<int32_t>(storage->index_));
      if (recording->named) recording->plan.labels.push_back({MemoryName::path(), "", ""});
      charge(recording->account, current_category, bytes);
    } else {
      place_in_arena(device, bytes);
      evict_on_paper(device, bytes);
      storage->source_ = Source::meta;
      LiveTensor live{MemoryName::path(), "", current_category, bytes};
      {
        const std::lock_guard lock(account_mutex);
        storage->index_ = meta_count++;
        live_on_meta.try_emplace(storage->index_, device, std::move(live));
      }
      charge(device, current_category, bytes);
    }
  } else if (active_step.plan != nullptr && active_step.device == device) {
    QLAB_CHECK(active_step.next < active_step.plan->blocks.size() &&
                   active_step.plan->blocks[active_step.next].bytes == bytes,
               "allocation {} of a step has {} bytes and is not in its plan", active_step.next,
               bytes);
    storage->source_ = Source::step;
    storage->data_ = active_step.base + active_step.plan->blocks[active_step.next++].offset;
  } else {
    if (std::shared_ptr<char> place = place_in_arena(device, bytes)) {
      storage->data_ = place.get();
      storage->owner_ = std::move(place);
    } else {
      storage->data_ = allocate_on(device, bytes);
    }
    if (storage->data_ == nullptr) out_of_memory(device, bytes, name_of(current_category));
    storage->source_ = Source::heap;
    charge(device, current_category, bytes);
  }
  return storage;
}

void Storage::set_category(Category category) {
  if (source_ != Source::heap && source_ != Source::meta) return;
  charge(device_, category_, -bytes_);
  charge(device_, category, bytes_);
  category_ = category;
  if (source_ != Source::meta) return;
  const std::lock_guard lock(account_mutex);
  live_on_meta.at(index_).second.category = category;
}

bool Storage::wants_kind() const {
  return source_ == Source::meta || (source_ == Source::recorded && recording && recording->named);
}

void Storage::set_kind(std::string kind) {
  if (source_ == Source::meta) {
    const std::lock_guard lock(account_mutex);
    live_on_meta.at(index_).second.kind = std::move(kind);
  } else {
    recording->plan.labels[static_cast<size_t>(index_)].kind = std::move(kind);
  }
}

void Storage::set_slot(std::string_view slot) {
  if (source_ != Source::recorded || !recording || !recording->named) return;
  std::string& own = recording->plan.labels[static_cast<size_t>(index_)].slot;
  if (own.empty()) own = slot;
}

std::shared_ptr<Storage> Storage::wrap(void* data, int64_t bytes, std::shared_ptr<void> owner,
                                       Device device) {
  auto storage = std::shared_ptr<Storage>(new Storage);
  storage->device_ = device;
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
      if (!owner_) release_on(device_, data_);
      break;
    case Source::recorded: {
      auto& state = *static_cast<Recording*>(owner_.get());
      if (index_ < static_cast<int64_t>(state.plan.blocks.size())) {  // not finished yet
        state.free.give(state.plan.blocks[index_].offset, bytes_);
        state.plan.events.push_back(~static_cast<int32_t>(index_));
        charge(state.account, category_, -bytes_);
      }
      break;
    }
    case Source::meta: {
      charge(device_, category_, -bytes_);
      const std::lock_guard lock(account_mutex);
      live_on_meta.erase(index_);
      break;
    }
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
  const auto is = [&](size_t i, char small, char large) {
    return i < unit.size() && (unit[i] == small || unit[i] == large);
  };
  const bool binary = unit.size() == 3 && is(1, 'i', 'I');
  if (!unit.empty() && !(unit.size() == 1 && is(0, 'b', 'B'))) {
    constexpr std::string_view small = "kmgt", large = "KMGT";
    const size_t power = std::min(small.find(unit[0]), large.find(unit[0]));
    if (power == small.npos || !is(unit.size() - 1, 'b', 'B') || unit.size() != (binary ? 3 : 2))
      return {};
    value *= std::pow(binary ? 1024.0 : 1000.0, static_cast<double>(power + 1));
  }
  if (!(value < 9e18)) return {};
  return static_cast<int64_t>(std::llround(value));
}

}  // namespace qlab
