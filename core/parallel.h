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

/// At the beginning of main, unless OMP_WAIT_POLICY is set: threads are to sleep while they wait.
/// Those that spin take the cores from each other and from other programs (one other busy process
/// made steps up to 25 times slower). OpenMP reads how to wait when it is loaded, so the program
/// starts itself once more.
void wait_without_spinning(char** argv);

}  // namespace qlab
