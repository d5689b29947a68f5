#include "optim/moments.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {
namespace {

/// Large enough for the bus and for a launch, small enough that few bytes move too many.
constexpr int64_t largest_page = int64_t{32} << 20, fewest_pages = 16, most_slots = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Memory of the host that no account knows: a device's peak is the same with or without it.
std::shared_ptr<void> host_memory(int64_t bytes, Device device) {
  if (!device.is_cuda()) {
    void* data = std::aligned_alloc(256, static_cast<size_t>(ceil_div(bytes, 256) * 256));
    if (data == nullptr)
      throw OutOfMemory(fmt::format("{} of host memory could not be had", format_bytes(bytes)));
    return {data, std::free};
  }
  const int64_t free = available_memory(Device::cpu());
  void* data = bytes <= free ? cuda::allocate_pinned(static_cast<size_t>(bytes)) : nullptr;
  if (data == nullptr)
    throw OutOfMemory(fmt::format(
        "a page of the optimizer's states needs {} of page-locked host memory, and the host has "
        "{}; set optim.type: adamw8bit, a smaller lora.r, or what makes the step smaller",
        format_bytes(bytes), format_bytes(free)));
  return {data, cuda::release_pinned};
}

}  // namespace

/// Moments of a page that comes and goes: arrived, updated, written back.
struct Moments::Transfer {
  cuda::Event ready, done, written;
};

Moments::Moments(int64_t blocks, DType dtype, bool paged, Device device)
    : blocks_(blocks), dtype_(dtype), paged_(paged), device_(device) {
  page_blocks_ = std::max<int64_t>(blocks, 1);
  if (paged)
    page_blocks_ = std::clamp<int64_t>(ceil_div(blocks, fewest_pages), 1,
                                       std::max<int64_t>(largest_page / bytes_of(1), 1));
  int64_t first = 0;
  do {
    const int64_t last = std::min(first + page_blocks_, blocks);
    Page& page = pages_.emplace_back(Page{first, last, {}, {}, {}});
    if (!paged || available_memory(device) >= bytes_of(last - first)) page.device = zeros(page);
    if (!page.device.defined()) {
      leave(page);
      if (page.host) std::memset(page.host.get(), 0, static_cast<size_t>(bytes_of(last - first)));
    }
    first = last;
  } while (first < blocks);
  if (paged) add_evictable(device, this);
}

Moments::~Moments() {
  if (!paged_) return;
  remove_evictable(device_, this);
  try {
    if (device_.is_cuda() && !moved_.empty()) cuda::synchronize();
  } catch (const Error&) {  // of a kernel before: said when it was met
  }
}

/// Undefined where the device refuses a page that may lie elsewhere: what is free can be in pieces.
Tensor Moments::zeros(const Page& page) const {
  try {
    return Tensor::zeros({2, block_size * (page.last - page.first)}, dtype_, device_);
  } catch (const OutOfMemory&) {
    if (!paged_) throw;
    return {};
  }
}

int64_t Moments::bytes_of(int64_t blocks) const {
  return 2 * block_size * blocks * static_cast<int64_t>(size_of(dtype_));
}

int64_t Moments::bytes_on_host() const {
  int64_t bytes = 0;
  for (const Page& page : pages_)
    if (!page.device.defined()) bytes += bytes_of(page.last - page.first);
  return bytes;
}

Tensor Moments::shape_at(const Tensor& memory, int64_t offset, const Page& page) const {
  return memory.bytes_at(offset, {2, block_size * (page.last - page.first)}, dtype_);
}

/// Gives a page that has no content a place on the host.
void Moments::leave(Page& page) {
  if (device_.is_meta()) return;
  page.host = host_memory(bytes_of(page.last - page.first), device_);
  if (!device_.is_cuda()) return;
  page.transfer = std::make_unique<Transfer>();
  if (in_ != nullptr) return;
  in_ = std::make_unique<cuda::CopyStream>();
  out_ = std::make_unique<cuda::CopyStream>();
  start_ = std::make_unique<cuda::Event>();
  residents_done_ = std::make_unique<cuda::Event>();
}

int64_t Moments::evict(int64_t bytes) {
  int64_t freed = 0;
  for (auto page = pages_.rbegin(); page != pages_.rend() && freed < bytes; ++page) {
    if (!page->device.defined()) continue;
    leave(*page);
    const auto size = static_cast<size_t>(page->device.bytes());
    if (device_.is_cuda()) {
      cuda::copy_async(page->host.get(), page->device.raw(), size);
      cuda::synchronize();
    } else if (device_.is_cpu()) {
      std::memcpy(page->host.get(), page->device.raw(), size);
    }
    freed += page->device.storage()->bytes();
    page->device = Tensor();
  }
  return freed;
}

void Moments::show(const Page& page, const Tensor& states, const Update& update) const {
  const Shape flat = {block_size * (page.last - page.first)};
  update(page.first, page.last, states.slice_rows(0, 1).view(flat),
         states.slice_rows(1, 2).view(flat));
}

void Moments::visit(const Tensor& idle, const Update& update) {
  traffic_ = {}, moved_.clear();
  const int64_t page_bytes = bytes_of(page_blocks_);
  Tensor slots = idle;
  int64_t depth = idle.defined() ? std::min(idle.bytes() / page_bytes, most_slots) : 0;
  if (bytes_on_host() > 0 && depth < 2) {
    depth = 2;
    const MemoryTag tag(Category::workspace);
    const MemoryName name("pages on their way");
    slots = Tensor::empty({depth * page_bytes}, DType::u8, device_);
  }
  std::vector<Page*> out;
  for (Page& page : pages_)
    if (!page.device.defined()) out.push_back(&page);
  const auto residents = [&] {
    for (const Page& page : pages_)
      if (page.device.defined()) show(page, page.device, update);
  };
  if (out.empty()) return residents();
  for (const Page* page : out) traffic_.bytes += 2 * bytes_of(page->last - page->first);
  moved_.assign(out.begin(), out.end());
  if (device_.is_cuda())
    visit_pinned_pages(out, slots, depth, update, residents);
  else
    visit_host_pages(out, slots, depth, update, residents);
}

void Moments::visit_host_pages(const std::vector<Page*>& pages, const Tensor& slots, int64_t depth,
                               const Update& update, const std::function<void()>& residents) {
  using Clock = std::chrono::steady_clock;
  residents();
  for (size_t k = 0; k < pages.size(); ++k) {
    const Page& page = *pages[k];
    const Tensor slot =
        shape_at(slots, static_cast<int64_t>(k) % depth * bytes_of(page_blocks_), page);
    const auto size = static_cast<size_t>(slot.bytes());
    const auto timed_copy = [&](void* to, const void* from) {
      if (device_.is_meta()) return;
      const auto start = Clock::now();
      std::memcpy(to, from, size);
      traffic_.stalled_seconds += std::chrono::duration<double>(Clock::now() - start).count();
    };
    timed_copy(slot.raw(), page.host.get());
    show(page, slot, update);
    timed_copy(page.host.get(), slot.raw());
    const OpScope scope("page", device_, {0, 2 * bytes_of_all(slot)});
  }
}

void Moments::visit_pinned_pages(const std::vector<Page*>& pages, const Tensor& slots,
                                 int64_t depth, const Update& update,
                                 const std::function<void()>& residents) {
  const auto slot_of = [&](size_t k) {
    return shape_at(slots, static_cast<int64_t>(k) % depth * bytes_of(page_blocks_), *pages[k]);
  };
  const auto fetch = [&](size_t k) {
    const Tensor slot = slot_of(k);
    in_->copy(slot.raw(), pages[k]->host.get(), static_cast<size_t>(slot.bytes()));
    pages[k]->transfer->ready.record(in_.get());
  };
  start_->record();
  start_->wait(in_.get());
  const auto ahead = static_cast<size_t>(depth);
  for (size_t k = 0; k < std::min(ahead, pages.size()); ++k) fetch(k);
  residents();
  residents_done_->record();
  for (size_t k = 0; k < pages.size(); ++k) {
    Transfer& transfer = *pages[k]->transfer;
    const Tensor slot = slot_of(k);
    transfer.ready.wait();
    show(*pages[k], slot, update);
    transfer.done.record();
    transfer.done.wait(out_.get());
    out_->copy(pages[k]->host.get(), slot.raw(), static_cast<size_t>(slot.bytes()));
    transfer.written.record(out_.get());
    if (k + ahead >= pages.size()) continue;
    transfer.written.wait(in_.get());
    fetch(k + ahead);
  }
  pages.back()->transfer->written.wait();
}

PageTraffic Moments::traffic() const {
  PageTraffic traffic = traffic_;
  if (!device_.is_cuda() || moved_.empty()) return traffic;
  // The stream is idle from the end of the last update to the arrival of the next page, and from
  // the last one until everything is back.
  const cuda::Event* before = residents_done_.get();
  for (const Page* page : moved_) {
    traffic.stalled_seconds += std::max(before->seconds_until(page->transfer->ready), 0.0);
    before = &page->transfer->done;
  }
  traffic.stalled_seconds += std::max(before->seconds_until(moved_.back()->transfer->written), 0.0);
  return traffic;
}

Tensor Moments::read(int which, int64_t n) const {
  if (!paged_)
    return pages_[0]
        .device.slice_rows(which, which + 1)
        .view({block_size * blocks_})
        .slice_rows(0, n);
  if (device_.is_cuda()) cuda::synchronize();
  const auto width = static_cast<int64_t>(size_of(dtype_));
  const std::shared_ptr<void> all(
      std::aligned_alloc(256, static_cast<size_t>(ceil_div(n * width, 256) * 256 + 256)),
      std::free);
  if (all == nullptr) throw OutOfMemory("the host has no memory to gather an optimizer's states");
  for (const Page& page : pages_) {
    const int64_t begin = block_size * page.first, end = std::min(block_size * page.last, n);
    if (begin >= end) continue;
    char* to = static_cast<char*>(all.get()) + begin * width;
    const auto size = static_cast<size_t>((end - begin) * width);
    const int64_t offset = which * bytes_of(page.last - page.first) / 2;
    const void* from = page.device.defined() ? static_cast<const char*>(page.device.raw()) + offset
                                             : static_cast<const char*>(page.host.get()) + offset;
    if (page.device.defined() && device_.is_cuda())
      cuda::copy_async(to, from, size);
    else
      std::memcpy(to, from, size);
  }
  if (device_.is_cuda()) cuda::synchronize();
  return Tensor::from_storage(Storage::wrap(all.get(), n * width, all), 0, {n}, dtype_);
}

void Moments::write(int which, const Tensor& values) {
  const auto width = static_cast<int64_t>(size_of(dtype_));
  if (device_.is_cuda()) cuda::synchronize();
  for (const Page& page : pages_) {
    const int64_t begin = block_size * page.first,
                  end = std::min(block_size * page.last, values.numel());
    if (begin >= end) continue;
    const Tensor part = values.slice_rows(begin, end);
    if (page.device.defined())
      copy(page.device.slice_rows(which, which + 1)
               .view({block_size * (page.last - page.first)})
               .slice_rows(0, end - begin),
           part);
    else
      std::memcpy(
          static_cast<char*>(page.host.get()) + which * bytes_of(page.last - page.first) / 2,
          part.raw(), static_cast<size_t>((end - begin) * width));
  }
  synchronize(device_);
}

}  // namespace qlab
