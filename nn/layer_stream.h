// Decoder layers whose weights wait in host memory, page-locked for a GPU, and come to the device
// for as long as a pass works on them. Two slots on the device take turns: while one layer is used,
// the next of the pass, in whichever direction it goes, is copied into the other slot on a stream
// of its own. A layer keeps its slot, so that its tensors keep their addresses.
#pragma once
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace qlab {

class LayerStream {
 public:
  static constexpr int64_t most_slots = 2;
  /// Whether layer l is one of `streamed`, which are spread evenly over `layers`.
  static bool is_streamed(int64_t l, int64_t streamed, int64_t layers) {
    return (l + 1) * streamed / layers > l * streamed / layers;
  }

  explicit LayerStream(Device device);
  ~LayerStream();
  LayerStream(const LayerStream&) = delete;
  LayerStream& operator=(const LayerStream&) = delete;

  /// Moves a layer's tensors to the host and makes them views of its slot. Returns its number. All
  /// layers have the same shapes. Throws OutOfMemory.
  size_t add(const std::vector<Tensor*>& parts);
  int64_t size() const { return static_cast<int64_t>(layers_.size()); }
  int64_t host_bytes() const;

  /// A forward pass of a batch on `device`, the model's own or its meta twin, begins; a backward
  /// pass may follow. The first layers are sent for.
  void begin(Device device);
  /// The layer's tensors are there for what is issued from now on, and the next one is sent for.
  /// The layer used before is not, until it is needed again.
  void need(size_t layer);
  /// What is issued from now on comes after all copies: a recording may not end before them.
  void end();

 private:
  struct Slot;
  Slot& slot_of(size_t layer) { return *slots_[layer % slots_.size()]; }
  Tensor host_block(int64_t bytes) const;
  void fetch(size_t layer);
  void arrive(Slot& slot);

  Device device_, pass_;
  std::vector<Tensor> layers_;  // u8 [bytes], on the host
  std::vector<std::unique_ptr<Slot>> slots_;
  std::ptrdiff_t current_ = -1;  // the layer in use; -1: none yet
  std::unique_ptr<cuda::CopyStream> copies_;
  std::unique_ptr<cuda::Event> issued_;  // all work on layers before the one in use
};

}  // namespace qlab
