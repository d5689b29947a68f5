// Launches that overlap with the end of the kernel before them (programmatic dependent launch, from
// compute capability 9.0 on; plain launches elsewhere). Blocks may start while the last blocks of
// the previous kernel still run: a microsecond less between two kernels.
#pragma once
#include <utility>

#include "cuda/launch.cuh"

namespace qlab::cuda {

/// Every thread of a kernel launched early calls this before it touches global memory: it returns
/// when everything issued before has finished.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

inline bool launches_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major >= 9;
}

template <class... Parameters, class... Arguments>
void launch_early_shared(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                         size_t shared_bytes, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream();
  config.attrs = &attribute;
  config.numAttrs = launches_early() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
  check_launch(op);
}
template <class... Parameters, class... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                  Arguments&&... arguments) {
  launch_early_shared(op, kernel, blocks, threads, 0, std::forward<Arguments>(arguments)...);
}

}  // namespace qlab::cuda
