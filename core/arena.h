// One block for tensors that come and go together. cudaMalloc rounds what is above 1 MiB up to 2
// MiB: the matrices of a 13B model, 12.5 MiB of codes each, would lose 5 % of the card.
#pragma once
#include <cstdint>

#include "core/device.h"

namespace qlab {

/// While alive, on this thread: weights and constants that are allocated on the device outside of
/// steps lie one behind the other in a block of `bytes`. What no longer fits, or all of it where no
/// such block can be had, is allocated by itself. The block is freed with the last of them;
/// accounts show the tensors alone. On meta the arena only counts. Not with QLAB_PLAIN_ALLOC. Does
/// not nest.
class Arena {
 public:
  explicit Arena(Device device, int64_t bytes = 0);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  /// Bytes that lie in it, or on meta would.
  int64_t taken() const;
};

}  // namespace qlab
