// Optimizer states in pages: out when memory is short, back for every update, never another bit.
#include "optim/moments.h"

#include <limits>

#include "optim/optimizer.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

/// A limit on a device's memory while it lives.
class Limit {
 public:
  Limit(Device device, int64_t bytes) : device_(device) { limit_memory(device, bytes); }
  ~Limit() { limit_memory(device_, std::numeric_limits<int64_t>::max()); }

 private:
  Device device_;
};

class MomentsTest : public OpTest {
 protected:
  int64_t held() const { return memory_account(device()).total; }
  /// Bytes that others ask for; pages go where they must.
  Tensor ask(int64_t bytes) const { return Tensor::empty({bytes}, DType::u8, device()); }
};
INSTANTIATE_TEST_SUITE_P(Ops, MomentsTest, testing::Values(cpu_f32, cuda_f32), name);

const std::vector<int64_t> sizes = {300000, 1000, 70001, 4096};
constexpr int64_t total = 375097;

AdamWConfig config(bool eight_bit, bool paged) {
  AdamWConfig c;
  c.weight_decay = 0.1f;
  c.eight_bit = eight_bit, c.paged = paged;
  return c;
}

struct Trained {
  Tensor param;
  AdamW optimizer;
  Trained(const AdamWConfig& c, const Case& at)
      : param(tensor(normals(total, 1), {total}, at)), optimizer(c, sizes, at.device) {}
  void step(int t, const Case& at, const Tensor& idle = {}) {
    optimizer.step(param, tensor(normals(total, 10 + static_cast<uint64_t>(t)), {total}, at), 1e-3f,
                   idle);
  }
};

void expect_same_run(const Trained& a, const Trained& b) {
  expect_same_bits(a.param, b.param);
  const auto of_a = a.optimizer.state(), of_b = b.optimizer.state();
  ASSERT_EQ(of_a.size(), of_b.size());
  for (size_t i = 0; i < of_a.size(); ++i) {
    EXPECT_EQ(of_a[i].first, of_b[i].first);
    expect_same_bits(of_a[i].second, of_b[i].second);
  }
}

// Pages leave in the middle of a run, some first, all of them later.
TEST_P(MomentsTest, PagedIsTheSameBits) {
  for (const bool eight_bit : {false, true}) {
    Trained whole(config(eight_bit, false), GetParam()), paged(config(eight_bit, true), GetParam());
    const Moments& moments = paged.optimizer.moments();
    const Tensor idle = ask(1 << 21);
    const int64_t bytes = moments.bytes();
    EXPECT_EQ(whole.optimizer.moments().bytes(), bytes);
    for (int t = 1; t <= 6; ++t) {
      SCOPED_TRACE(t);
      whole.step(t, GetParam());
      paged.step(t, GetParam(), idle);
      EXPECT_EQ(moments.traffic().bytes, 2 * moments.bytes_on_host());
      EXPECT_GE(moments.traffic().stalled_seconds, 0);
      expect_same_run(paged, whole);
      const int64_t before = held() + moments.bytes_on_host();
      if (t == 2) {
        const Limit limit(device(), held() + bytes / 3);
        const Tensor other = ask(bytes / 2);
        EXPECT_GE(moments.bytes_on_host(), bytes / 2 - bytes / 3);
        EXPECT_LT(moments.bytes_on_host(), bytes / 3);  // no more than the pages that were short
        EXPECT_EQ(held() + moments.bytes_on_host(), before + other.storage()->bytes());
      } else if (t == 4) {
        const Limit limit(device(), held());
        ask(bytes - moments.bytes_on_host());
        EXPECT_EQ(moments.bytes_on_host(), bytes);
        EXPECT_EQ(held() + bytes, before);
        EXPECT_ERROR(ask(bytes), "out of memory");
      }
    }
    EXPECT_EQ(whole.optimizer.moments().bytes_on_host(), 0);
    EXPECT_EQ(whole.optimizer.moments().traffic().bytes, 0);
  }
}

// Without idle memory the way through the device is allocated, for the update alone.
TEST_P(MomentsTest, BringsItsOwnWayWhereNoneIsIdle) {
  Trained whole(config(false, false), GetParam()), paged(config(false, true), GetParam());
  {
    const Limit limit(device(), held());
    ask(paged.optimizer.moments().bytes());
  }
  ASSERT_EQ(paged.optimizer.moments().bytes_on_host(), paged.optimizer.moments().bytes());
  const int64_t before = held();
  for (int t = 1; t <= 2; ++t) {
    whole.step(t, GetParam());
    paged.step(t, GetParam(), t == 1 ? Tensor() : ask(1000));
  }
  EXPECT_EQ(held(), before);
  expect_same_run(paged, whole);
}

TEST_P(MomentsTest, BeginsOnTheHostWhereThereIsNoRoom) {
  Trained whole(config(false, false), GetParam());
  const Tensor p = whole.param.clone();
  const Limit limit(device(), held() + 1000000);
  AdamW paged(config(false, true), sizes, device());
  EXPECT_GT(paged.moments().bytes_on_host(), 0);
  EXPECT_LT(paged.moments().bytes_on_host(), paged.moments().bytes());
  limit_memory(device(), std::numeric_limits<int64_t>::max());
  for (int t = 1; t <= 2; ++t) {
    whole.step(t, GetParam());
    paged.step(p, tensor(normals(total, 10 + static_cast<uint64_t>(t)), {total}, GetParam()),
               1e-3f);
  }
  expect_same_bits(p, whole.param);
}

TEST_P(MomentsTest, IsSavedAndRestoredWhereverItLies) {
  for (const bool eight_bit : {false, true}) {
    Trained source(config(eight_bit, false), GetParam());
    for (int t = 1; t <= 2; ++t) source.step(t, GetParam());
    std::map<std::string, Tensor> files;
    for (const auto& [name, tensor] : source.optimizer.state())
      files[name] = tensor.clone().to(Device::cpu());
    synchronize(device());
    Trained target(config(eight_bit, true), GetParam());
    {
      const Limit limit(device(), held());
      ask(target.optimizer.moments().bytes() / 2);
    }
    ASSERT_GT(target.optimizer.moments().bytes_on_host(), 0);
    target.optimizer.restore(
        [&](const std::string& name, const Shape& shape, DType dtype) {
          EXPECT_EQ(files.at(name).shape().str(), shape.str());
          EXPECT_EQ(files.at(name).dtype(), dtype);
          return files.at(name);
        },
        source.optimizer.steps());
    copy(target.param, source.param);
    expect_same_run(target, source);
    source.step(3, GetParam()), target.step(3, GetParam());
    expect_same_run(target, source);
  }
}

// What leaves, and what the way through the device takes, is known on paper.
TEST_P(MomentsTest, GoesOnMetaAsOnTheDevice) {
  const auto course = [&](Device where, bool eight_bit, int64_t asked) {
    const auto held = [&] { return memory_account(where).total; };
    const int64_t start = held();
    AdamW optimizer(config(eight_bit, true), sizes, where);
    const Tensor p = Tensor::zeros({total}, DType::f32, where);
    std::vector<int64_t> course = {held() - start};
    {
      const Limit limit(where, held() + 1024);
      const Tensor other = Tensor::empty({asked}, DType::u8, where);
      course.insert(course.end(), {held() - start, optimizer.moments().bytes_on_host()});
    }
    reset_peak(where);
    optimizer.step(p, p, 1e-3f);
    course.insert(course.end(), {memory_account(where).peak - start, held() - start});
    return course;
  };
  for (const bool eight_bit : {false, true})
    for (const int64_t asked : {1000, 50000, 700000}) {
      const std::vector<int64_t> real = course(device(), eight_bit, asked);
      EXPECT_EQ(real, course(device().meta(), eight_bit, asked)) << asked;
      EXPECT_EQ(real[2] > 0, asked > 1000) << asked;
    }
}

TEST(Moments, UnpagedStatesStay) {
  AdamW optimizer(config(false, false), sizes, Device::cpu());
  const Limit limit(Device::cpu(), memory_account(Device::cpu()).total);
  EXPECT_ERROR(Tensor::empty({1000}, DType::u8, Device::cpu()), "out of memory");
  EXPECT_EQ(optimizer.moments().bytes_on_host(), 0);
}

}  // namespace
}  // namespace qlab::test
