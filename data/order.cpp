#include "data/order.h"

#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/random.h"

namespace qlab {

ExampleOrder::ExampleOrder(int64_t size, uint64_t seed, bool shuffle)
    : size_(size), key_(stream_key(seed, "data order")), shuffle_(shuffle) {
  QLAB_CHECK(size > 0, "an order needs at least one example, got {}", size);
}

int64_t ExampleOrder::at(int64_t running_index) const {
  QLAB_CHECK(running_index >= 0, "examples are counted from 0, got {}", running_index);
  const int64_t index = running_index % size_;
  if (!shuffle_) return index;
  const int64_t epoch = running_index / size_;
  if (epoch != epoch_) permute(epoch);
  return permutation_[static_cast<size_t>(index)];
}

void ExampleOrder::permute(int64_t epoch) const {
  permutation_.resize(static_cast<size_t>(size_));
  std::iota(permutation_.begin(), permutation_.end(), int64_t{0});
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  for (int64_t i = size_ - 1; i > 0; --i) {
    const Philox r = philox(key_, low(i), high(i), low(epoch), high(epoch));
    const uint64_t random = static_cast<uint64_t>(r.lane[1]) << 32 | r.lane[0];
    // The upper half of random * (i + 1): uniform on [0, i] up to i / 2^64.
    const auto j = static_cast<size_t>(
        static_cast<unsigned __int128>(random) * static_cast<uint64_t>(i + 1) >> 64);
    std::swap(permutation_[static_cast<size_t>(i)], permutation_[j]);
  }
  epoch_ = epoch;
}

}  // namespace qlab
