// Dynamic loss scaling, which fp16 needs: its gradients would vanish below 2^-24 (Micikevicius et
// al. 2018, section 3.2). The rule and its constants are those of PyTorch's GradScaler: a step
// whose gradients are not finite is skipped and halves the factor, 2000 finite ones in a row double
// it. Factors are powers of two, so that multiplying and dividing by them rounds nothing.
#pragma once
#include <cmath>
#include <cstdint>

namespace qlab {

struct LossScale {
  float factor = 65536;  // on the loss of the next step
  int64_t finite = 0;    // steps in a row
  int64_t skipped = 0;   // steps so far

  void update(bool gradients_finite) {
    constexpr int64_t growth_interval = 2000;
    if (!gradients_finite) {
      factor /= 2, finite = 0, ++skipped;
    } else if (++finite == growth_interval) {
      finite = 0;
      if (std::isfinite(2 * factor)) factor *= 2;
    }
  }
};

}  // namespace qlab
