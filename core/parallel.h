// A static partition of [0, n) over the CPU's threads. Each index is handled by exactly one thread
// and in order, so results do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <functional>

namespace qlab {

int thread_count();  // OMP_NUM_THREADS or the number of cores
void set_thread_count(int count);
/// Calls body(begin, end) on disjoint ranges that cover [0, n); ranges have at least `grain`
/// indices.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace qlab
