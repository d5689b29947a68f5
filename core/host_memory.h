// How much memory a process on this host may still take.
#pragma once
#include <cstdint>
#include <string>

namespace qlab {

/// MemAvailable of /proc/meminfo, or less where a control group that the process is in leaves less:
/// for each group from its own up to the root, version 2 or 1, limit - usage + page cache of files,
/// which is reclaimed before anything is refused. INT64_MAX where nothing is known. `root` stands
/// for /.
int64_t available_host_memory(const std::string& root = "");

}  // namespace qlab
