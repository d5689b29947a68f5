#include "experiments/gradient_sum.h"

#include <algorithm>

#include "core/ops/add.h"
#include "core/ops/copy.h"
#include "core/profile.h"

namespace qlab {

GradientSum::GradientSum(const Adapter& adapter, int64_t replicas, int64_t rounds)
    : own_(adapter.gradients()), replicas_(replicas) {
  const MemoryName name("gradients of replicas");
  const Device device = own_.device();
  constexpr int64_t aligned = 64;  // elements, so that every replica's part begins at a cache line
  const int64_t most = staging_bytes / static_cast<int64_t>(sizeof(float)) / replicas;
  chunk_ = std::clamp(own_.numel(), int64_t{1}, std::max(most / aligned, int64_t{1}) * aligned);
  {
    const MemoryTag tag(Category::gradients);
    total_ = rounds > 1 ? Tensor::empty(own_.shape(), DType::f32, device) : own_;
  }
  const MemoryTag tag(Category::workspace);
  staging_ = Tensor::empty({replicas * chunk_}, DType::f32, device);
}

void GradientSum::add(Replicas* replicas, int64_t count, bool first) {
  const int64_t n = own_.numel();
  for (int64_t begin = 0; begin < n; begin += chunk_) {
    const int64_t size = std::min(chunk_, n - begin);
    const Tensor all = staging_.slice_rows(0, replicas_ * size);
    const Tensor own = own_.slice_rows(begin, begin + size);
    if (replicas != nullptr) {
      const OpScope scope("gather of replicas", own.device(), {0, bytes_of_all(own, all)});
      replicas->gather(all, own);
    }
    const Tensor sum = total_.slice_rows(begin, begin + size);
    if (first) fill_zero(sum);
    for (int64_t r = 0; r < count; ++r) add_inplace(sum, all.slice_rows(r * size, (r + 1) * size));
  }
}

}  // namespace qlab
