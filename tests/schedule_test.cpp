#include "optim/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"

namespace qlab {
namespace {

// Values of Transformers' get_*_schedule_with_warmup with 10 warm-up steps of 110.
TEST(Schedule, Factors) {
  constexpr int64_t w = 10, total = 110;
  struct Row {
    int64_t step;
    double constant, linear, cosine;
  };
  const Row rows[] = {
      {0, 0, 0, 0},
      {1, 0.1, 0.1, 0.1},
      {w - 1, 0.9, 0.9, 0.9},
      {w, 1, 1, 1},
      {w + 25, 1, 0.75, 0.85355339059327373},  // (1 + cos(pi / 4)) / 2
      {(w + total) / 2, 1, 0.5, 0.5},
      {total - 1, 1, 0.01, 2.4671981713420017e-4},  // (1 + cos(0.99 pi)) / 2
      {total, 1, 0, 0},
      {total + 5, 1, 0, 6.1558297024311148e-3},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.step);
    EXPECT_DOUBLE_EQ(schedule_factor(Schedule::constant, row.step, w, total), row.constant);
    EXPECT_DOUBLE_EQ(schedule_factor(Schedule::linear, row.step, w, total), row.linear);
    EXPECT_NEAR(schedule_factor(Schedule::cosine, row.step, w, total), row.cosine, 1e-15);
  }
}

TEST(Schedule, WithoutWarmUpTheFirstStepIsFull) {
  for (const Schedule s : {Schedule::constant, Schedule::linear, Schedule::cosine}) {
    EXPECT_EQ(schedule_factor(s, 0, 0, 10), 1);
    EXPECT_EQ(schedule_factor(s, 0, 0, 1), 1);
  }
  EXPECT_EQ(schedule_factor(Schedule::linear, 9, 0, 10), 0.1);
}

TEST(Schedule, WarmUpMayBeTheWholeRun) {
  for (const Schedule s : {Schedule::constant, Schedule::linear, Schedule::cosine}) {
    EXPECT_EQ(schedule_factor(s, 3, 4, 4), 0.75);
    EXPECT_EQ(schedule_factor(s, 3, 8, 4), 0.375);
  }
}

TEST(Schedule, Names) {
  EXPECT_EQ(schedule_from_name("constant"), Schedule::constant);
  EXPECT_EQ(schedule_from_name("linear"), Schedule::linear);
  EXPECT_EQ(schedule_from_name("cosine"), Schedule::cosine);
  EXPECT_THROW(schedule_from_name("step"), Error);
}

}  // namespace
}  // namespace qlab
