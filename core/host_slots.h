// Memory of the host beside a device, page-locked for a GPU: numbered blocks that outlive a step,
// for what a step puts aside and takes back.
#pragma once
#include <vector>

#include "core/tensor.h"

namespace qlab {

class HostSlots {
 public:
  explicit HostSlots(Device device) : device_(device) {}
  ~HostSlots();
  HostSlots(const HostSlots&) = delete;
  HostSlots& operator=(const HostSlots&) = delete;

  /// Copies a contiguous tensor to the block, in stream order. A meta tensor only says how large
  /// the block must be.
  void put(size_t slot, const Tensor& x);
  /// Copies it back to `x`, of the same shape and dtype.
  void get(size_t slot, const Tensor& x) const;
  /// Allocates what meta tensors asked for; between steps. Throws OutOfMemory.
  void reserve();
  /// Changes whenever a block does: recorded steps hold addresses.
  int generation() const { return generation_; }

 private:
  struct Block {
    int64_t wanted = 0, bytes = 0;
    Tensor host;             // on a CPU, and on meta
    void* pinned = nullptr;  // for a GPU
  };
  void* data(size_t slot) const;
  void release(Block& block);

  Device device_;
  std::vector<Block> blocks_;
  int generation_ = 0;
};

}  // namespace qlab
