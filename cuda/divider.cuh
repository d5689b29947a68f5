// Division by a number that is fixed for a launch.
#pragma once
#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "core/error.h"

namespace qlab::cuda {

/// n / divisor for n < 2^31 as a product and a shift (Granlund and Montgomery 1994).
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    QLAB_CHECK(divisor > 0 && divisor <= INT32_MAX, "a row of {} units is too long", divisor);
    if (divisor == 1) return;
    const int bits = 31 + std::bit_width(divisor_ - 1);  // 31 + ceil(log2 divisor)
    factor_ = static_cast<uint32_t>(((uint64_t{1} << bits) + divisor_ - 1) / divisor_);
    shift_ = static_cast<uint32_t>(bits - 32);
  }
  __device__ uint32_t quotient(uint32_t n) const {
    return divisor_ == 1 ? n : __umulhi(n, factor_) >> shift_;
  }
  __device__ uint32_t divisor() const { return divisor_; }

 private:
  uint32_t divisor_, factor_ = 0, shift_ = 0;
};

}  // namespace qlab::cuda
