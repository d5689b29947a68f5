// Memory of the host beside a device, page-locked for a GPU: numbered blocks that outlive a step,
// for what a step puts aside and takes back. On a GPU copies run on a stream of their own, which
// events fork from the step's and join to it again, so that they can be recorded with it.
#pragma once
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace qlab {

class HostSlots {
 public:
  explicit HostSlots(Device device);
  ~HostSlots();
  HostSlots(const HostSlots&) = delete;
  HostSlots& operator=(const HostSlots&) = delete;

  /// Begins to copy a contiguous tensor to the block; until wait() nobody may write it or give it
  /// back. A meta tensor only says how large the block must be.
  void put(size_t slot, const Tensor& x);
  /// Begins to copy it back to `x`, of the same shape and dtype, which is there after wait().
  void get(size_t slot, const Tensor& x);
  /// What is issued from now on comes after the copy that began last. One is under way at a time.
  void wait();
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
  void begin(const Tensor& x);

  Device device_;
  std::vector<Block> blocks_;
  Tensor moving_;  // until wait(); what the plan takes for it stays taken
  std::unique_ptr<cuda::CopyStream> copies_;
  std::unique_ptr<cuda::Event> issued_, done_;
  int generation_ = 0;
};

}  // namespace qlab
