#include "core/host_slots.h"

#include <algorithm>
#include <utility>

#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {

HostSlots::HostSlots(Device device) : device_(device) {
  if (!device.is_cuda()) return;
  copies_ = std::make_unique<cuda::CopyStream>();
  issued_ = std::make_unique<cuda::Event>();
  done_ = std::make_unique<cuda::Event>();
}

HostSlots::~HostSlots() {
  try {
    if (device_.is_cuda() && !blocks_.empty()) cuda::synchronize();
  } catch (const Error&) {  // of a kernel before: said when it was met
  }
  for (Block& block : blocks_) release(block);
}

void HostSlots::release(Block& block) {
  if (block.pinned != nullptr) cuda::release_pinned(block.pinned);
  block.pinned = nullptr;
  block.host = Tensor();
  block.bytes = 0;
}

void* HostSlots::data(size_t slot) const {
  const Block& block = blocks_.at(slot);
  return block.pinned != nullptr ? block.pinned : block.host.raw();
}

/// Copies come after all that was issued: what made `x`, or what used its memory before.
void HostSlots::begin(const Tensor& x) {
  QLAB_CHECK(!moving_.defined(), "a block is on its way already");
  moving_ = x;
  if (!x.device().is_cuda()) return;
  issued_->record();
  issued_->wait(copies_.get());
}

void HostSlots::put(size_t slot, const Tensor& x) {
  QLAB_CHECK(x.contiguous(), "only whole blocks go to the host, not {}", x.str());
  begin(x);
  if (x.device().is_meta()) {
    if (blocks_.size() <= slot) blocks_.resize(slot + 1);
    blocks_[slot].wanted = std::max(blocks_[slot].wanted, x.bytes());
    return;
  }
  QLAB_CHECK(slot < blocks_.size() && x.bytes() <= blocks_[slot].bytes,
             "a step puts aside what its plan did not");
  if (x.device().is_cuda()) {
    copies_->copy(data(slot), x.raw(), static_cast<size_t>(x.bytes()));
    done_->record(copies_.get());
  } else {
    copy(blocks_[slot].host.bytes_at(0, x.shape(), x.dtype()), x);
  }
}

void HostSlots::get(size_t slot, const Tensor& x) {
  begin(x);
  if (x.device().is_cuda()) {
    copies_->copy(x.raw(), data(slot), static_cast<size_t>(x.bytes()));
    done_->record(copies_.get());
  } else if (x.device().is_cpu()) {
    copy(x, blocks_.at(slot).host.bytes_at(0, x.shape(), x.dtype()));
  }
}

void HostSlots::wait() {
  const Tensor x = std::exchange(moving_, Tensor());
  QLAB_CHECK(x.defined(), "nothing is on its way");
  const OpScope scope("offload", x.device(), {0, bytes_of_all(x)});
  if (x.device().is_cuda()) done_->wait();
}

void HostSlots::reserve() {
  int64_t more = 0;
  for (const Block& block : blocks_)
    if (block.wanted > block.bytes) more += block.wanted - block.bytes;
  if (more == 0) return;
  ++generation_;
  if (device_.is_cuda()) {
    cuda::synchronize();
    const int64_t free = available_memory(Device::cpu());
    if (more > free)
      throw OutOfMemory(fmt::format(
          "the host has {} and {} are to be put aside there; set train.recompute: full, "
          "a smaller train.batch_size or data.seq_len",
          format_bytes(free), format_bytes(more)));
  }
  for (Block& block : blocks_) {
    if (block.wanted <= block.bytes) continue;
    release(block);
    if (device_.is_cuda()) {
      block.pinned = cuda::allocate_pinned(static_cast<size_t>(block.wanted));
      if (block.pinned == nullptr)
        throw OutOfMemory(fmt::format("{} of page-locked host memory could not be had",
                                      format_bytes(block.wanted)));
    } else {
      const MemoryTag tag(Category::activations);
      const MemoryName name("put aside on the host");
      block.host = Tensor::empty({block.wanted}, DType::u8,
                                 device_.is_meta() ? Device::cpu().meta() : Device::cpu());
    }
    block.bytes = block.wanted;
  }
}

}  // namespace qlab
