#include "core/arena.h"

#include <gtest/gtest.h>

#include "core/memory.h"
#include "core/ops/copy.h"
#include "core/tensor.h"
#include "quant/quantize.h"

namespace qlab::test {
namespace {

class ArenaTest : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
    if (GetParam().is_cuda() && cuda::device_count() == 0)
      GTEST_SKIP() << "needs a GPU and a build with CUDA";
    if (!StepMemory::planned()) GTEST_SKIP() << "QLAB_PLAIN_ALLOC is set";
  }
  Device device() const { return GetParam(); }
  Tensor make(int64_t bytes, Category category) const {
    const MemoryTag tag(category);
    return Tensor::empty({bytes}, DType::u8, device());
  }
};

INSTANTIATE_TEST_SUITE_P(Runs, ArenaTest, testing::Values(Device::cpu(), Device::cuda()),
                         [](const auto& info) { return info.param.is_cuda() ? "cuda" : "cpu"; });

TEST_P(ArenaTest, HoldsWeightsAndConstantsSideBySide) {
  const int64_t before = memory_account(device()).total;
  Tensor w, c, other, beyond;
  {
    const Arena arena(device(), 1024);
    w = make(100, Category::weights);
    other = make(256, Category::workspace);
    c = make(512, Category::constants);
    EXPECT_EQ(arena.taken(), 256 + 512);
    beyond = make(512, Category::weights);  // no longer fits
    EXPECT_EQ(arena.taken(), 256 + 512);
  }
  const auto at = [](const Tensor& t) { return static_cast<const char*>(t.raw()); };
  EXPECT_EQ(at(c) - at(w), 256);
  EXPECT_TRUE(at(beyond) < at(w) || at(beyond) >= at(w) + 1024);
  EXPECT_EQ(memory_account(device()).total - before, 256 + 256 + 512 + 512);
  // The block lives as long as one of them.
  w = Tensor();
  fill_zero(c);
  synchronize(device());
  c = other = beyond = Tensor();
  EXPECT_EQ(memory_account(device()).total, before);
}

TEST_P(ArenaTest, CountsOnMeta) {
  const Arena arena(device().meta());
  const MemoryTag tag(Category::weights);
  const Tensor a = Tensor::empty({3}, DType::f32, device().meta());
  { const Tensor b = Tensor::empty({300}, DType::u8, device().meta()); }
  EXPECT_EQ(arena.taken(), 256 + 512);
}

TEST_P(ArenaTest, OneThatCannotBeHadIsNone) {
  const int64_t limit = limit_memory(device(), memory_account(device()).total + 4096);
  {
    const Arena arena(device(), 1 << 20);
    EXPECT_TRUE(make(1024, Category::weights).defined());
  }
  limit_memory(device(), limit);
}

// Another model's tensors may use it after this one's are gone.
TEST_P(ArenaTest, DoesNotHoldTheDynamicMap) {
  const Tensor w = make(64 * 64 * 4, Category::workspace).bytes_at(0, {64, 64}, DType::f32);
  fill_zero(w);
  const Arena arena(device(), 1 << 20);
  const Nf4Tensor x = quantize_nf4(w, 64, true);
  const auto* const begin = static_cast<const char*>(x.codes.raw());
  const auto inside = [&](const Tensor& t) {
    return t.raw() >= begin && static_cast<const char*>(t.raw()) < begin + (1 << 20);
  };
  EXPECT_TRUE(inside(x.absmax_code));
  EXPECT_TRUE(inside(x.offset));
  EXPECT_FALSE(inside(x.map));
}

}  // namespace
}  // namespace qlab::test
