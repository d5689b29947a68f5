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

template <class... Parameters, class... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                  Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = current_stream();
  config.attrs = &attribute;
  // Code for older GPUs does not wait.
  config.numAttrs = code_architecture() >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
  check_launch(op);
}

}  // namespace qlab::cuda
