// What control groups leave, on trees of files as Linux shows them.
#include "core/host_memory.h"

#include "tests/support/files.h"

namespace qlab {
namespace {

class HostMemoryTest : public testing::Test {
 protected:
  HostMemoryTest() {
    root_.write("proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n");
  }
  void group(const std::string& path, const std::string& max, int64_t current,
             const std::string& statistics = "") const {
    const std::string folder = "sys/fs/cgroup" + path + "/memory.";
    root_.write(folder + "max", max + "\n");
    root_.write(folder + "current", std::to_string(current) + "\n");
    root_.write(folder + "stat", statistics);
  }
  void group1(const std::string& path, int64_t limit, int64_t usage,
              const std::string& statistics = "") const {
    const std::string folder = "sys/fs/cgroup/memory" + path + "/memory.";
    root_.write(folder + "limit_in_bytes", std::to_string(limit) + "\n");
    root_.write(folder + "usage_in_bytes", std::to_string(usage) + "\n");
    root_.write(folder + "stat", statistics);
  }
  int64_t available() const { return available_host_memory(root_.path()); }

  test::TemporaryFolder root_;
};

constexpr int64_t machine = 4000 * 1024;

TEST_F(HostMemoryTest, WithoutGroups) { EXPECT_EQ(available(), machine); }

TEST_F(HostMemoryTest, TheTightestGroupAboveCounts) {
  root_.write("proc/self/cgroup", "0::/user.slice/job/part\n");
  group("/user.slice/job/part", "max", 100);
  group("/user.slice/job", "3000000", 1000000);
  group("/user.slice", "5000000", 2500000);
  EXPECT_EQ(available(), 2000000);
  group("/user.slice", "5000000", 4000000);
  EXPECT_EQ(available(), 1000000);
  group("/user.slice", "5000000", 6000000);
  EXPECT_EQ(available(), 0);
  group("/user.slice", "90000000", 0);
  group("/user.slice/job", "max", 1000000);
  EXPECT_EQ(available(), machine);
}

TEST_F(HostMemoryTest, CachedFilesAreGivenBack) {
  root_.write("proc/self/cgroup", "0::/job\n");
  group("/job", "3000000", 2900000,
        "anon 400000\nfile 2500000\ninactive_anon 7\nactive_file 500000\ninactive_file 1500000\n");
  EXPECT_EQ(available(), 2100000);
}

TEST_F(HostMemoryTest, AContainerSeesItsGroupAsTheRoot) {
  group("", "3000000", 2000000);
  for (const char* path : {"/", "/docker/0123", "/../.."}) {
    root_.write("proc/self/cgroup", std::string("0::") + path + "\n");
    EXPECT_EQ(available(), 1000000) << path;
  }
}

TEST_F(HostMemoryTest, VersionOne) {
  root_.write("proc/self/cgroup", "9:name=systemd:/\n5:cpuset,memory:/a/b\n3:cpu:/c\n0::/\n");
  group1("", 0x7ffffffffffff000, 123456);
  group1("/a", 9000000, 8500000,
         "inactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 0\n");
  group1("/a/b", 3000000, 100);
  EXPECT_EQ(available(), 700000);
}

}  // namespace
}  // namespace qlab
