// The table of `qlab train --profile`.
#include "experiments/profile_table.h"

#include <gmock/gmock.h>

namespace qlab::test {
namespace {

using testing::ContainsRegex;

TEST(ProfileTable, EachOperationBesideTheCeilingThatLimitsIt) {
  const Ceilings ceilings{.flops_per_s = 800e12, .bytes_per_s = 3e12};
  Profile profile;
  profile.seconds = 20e-3;
  profile.lines = {{.name = "gemm", .calls = 7, .seconds = 10e-3, .work = {6e12, 1e9}},
                   {.name = "rms_norm", .calls = 64, .seconds = 4e-3, .work = {1e9, 9e9}},
                   {.name = "unknown", .calls = 1, .seconds = 1e-3, .work = {}}};
  const std::string table = profile_table(profile, ceilings);
  EXPECT_THAT(table,
              ContainsRegex("one step: 20.00 ms; ceilings measured now: 800 TFLOP/s, 3.00 TB/s"));
  EXPECT_THAT(table, ContainsRegex("gemm +7 +10.000 +50.0% +600.0 TFLOP/s +75%\n"));
  EXPECT_THAT(table, ContainsRegex("rms_norm +64 +4.000 +20.0% +2250.0 GB/s +75%\n"));
  EXPECT_THAT(table, ContainsRegex("unknown +1 +1.000 +5.0% +0.0 GB/s +0%\n"));
  EXPECT_THAT(table, ContainsRegex("between operations +5.000 +25.0%\n"));
}

}  // namespace
}  // namespace qlab::test
