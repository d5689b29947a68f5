#include "core/profile.h"

#include <cuda_profiler_api.h>
#include <nvtx3/nvToolsExt.h>

#include <vector>

#include "cuda/launch.cuh"

namespace qlab::cuda {
namespace {

thread_local std::vector<cudaEvent_t> marks;
thread_local size_t used = 0;  // events are kept for the next profile

}  // namespace

int64_t mark() {
  if (used == marks.size()) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "cudaEventCreate");
    marks.push_back(event);
  }
  check(cudaEventRecord(marks[used], current_stream()), "cudaEventRecord");
  return static_cast<int64_t>(used++);
}

double seconds_between(int64_t first, int64_t second) {
  float milliseconds = 0;
  check(cudaEventSynchronize(marks.at(static_cast<size_t>(second))), "cudaEventSynchronize");
  check(cudaEventElapsedTime(&milliseconds, marks.at(static_cast<size_t>(first)),
                             marks.at(static_cast<size_t>(second))),
        "cudaEventElapsedTime");
  return milliseconds * 1e-3;
}

void clear_marks() { used = 0; }

void push_range(const char* name) { nvtxRangePushA(name); }
void pop_range() { nvtxRangePop(); }

void start_external_profiler() { cudaProfilerStart(); }
void stop_external_profiler() { cudaProfilerStop(); }

}  // namespace qlab::cuda
