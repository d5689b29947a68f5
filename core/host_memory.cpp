#include "core/host_memory.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>

namespace qlab {
namespace {

namespace fs = std::filesystem;

constexpr int64_t unknown = INT64_MAX;

/// What the two versions call things.
struct GroupFiles {
  const char *limit, *usage, *inactive, *active;
};
constexpr GroupFiles version1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                 "total_inactive_file", "total_active_file"};
constexpr GroupFiles version2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

/// Of a file that holds one number; none where it is absent or says "max".
std::optional<int64_t> number_in(const fs::path& path) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? std::optional(value) : std::nullopt;
}

int64_t left_of_group(const fs::path& group, const GroupFiles& files) {
  const auto limit = number_in(group / files.limit), usage = number_in(group / files.usage);
  if (!limit || !usage) return unknown;
  int64_t held = *usage;
  std::ifstream statistics(group / "memory.stat");
  std::string key;
  for (int64_t value = 0; statistics >> key >> value;)
    if (key == files.inactive || key == files.active) held -= value;
  return std::max<int64_t>(*limit - std::max<int64_t>(held, 0), 0);
}

/// `path` is the group's, below `mount`. A container may see another host's path for its own group,
/// which is then the root of what it sees.
int64_t left_of_groups(const fs::path& mount, const std::string& path, const GroupFiles& files) {
  int64_t left = unknown;
  for (fs::path group = fs::path(path).lexically_normal();; group = group.parent_path()) {
    left = std::min(left, left_of_group(mount / group.relative_path(), files));
    if (!group.has_relative_path()) return left;
  }
}

int64_t left_of_own_groups(const std::string& root) {
  const fs::path mount = root + "/sys/fs/cgroup";
  int64_t left = unknown;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first, second - first),
                      path = line.substr(second + 1);
    if (controllers == ":") left = std::min(left, left_of_groups(mount, path, version2));
    if ((controllers + ",").find("memory,") != std::string::npos)
      left = std::min(left, left_of_groups(mount / "memory", path, version1));
  }
  return left;
}

int64_t left_of_machine(const std::string& root) {
  std::ifstream file(root + "/proc/meminfo");
  std::string key, unit;
  for (int64_t kib = 0; file >> key >> kib >> unit;)
    if (key == "MemAvailable:") return kib * 1024;
  return unknown;
}

}  // namespace

int64_t available_host_memory(const std::string& root) {
  return std::min(left_of_machine(root), left_of_own_groups(root));
}

}  // namespace qlab
