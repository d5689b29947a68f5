// Launches that overlap with the end of the kernel before them (programmatic dependent launch, from
// compute capability 9.0 on; plain launches elsewhere). Blocks may start while the last blocks of
// the previous kernel still run: a microsecond less between two kernels.
#pragma once
#include <array>
#include <atomic>

#include "cuda/launch.cuh"

namespace qlab::cuda {

/// Every thread of a kernel launched early calls this before it touches global memory: it returns
/// when everything issued before has finished. Before that it may read codes and scales of NF4,
/// whose writers tell writes_read_early().
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

/// Code for older GPUs does not wait, and knows no clusters.
inline bool launches_early() { return code_architecture() >= 90; }

/// Per device, as its stream is: whether the kernels issued last write what others read early. Set
/// behind the last of them. (Copies need none: nothing starts before they have ended.)
inline std::atomic<bool>& writes_read_early() {
  static std::array<std::atomic<bool>, 64> under_way{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return under_way.at(static_cast<size_t>(device));
}

/// Whether the next kernel may start before the one before it has ended. After such writes it does
/// not: it starts when all is written, and those behind it start later still.
inline bool may_overlap() { return launches_early() && !writes_read_early().exchange(false); }

template <class... Parameters, class... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape,
                  Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = may_overlap() ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = attributes[1].val.clusterDim.z = 1;
  attributes[1].val.clusterDim.y = shape.cluster;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = current_stream();
  config.attrs = attributes;
  config.numAttrs = !launches_early() ? 0 : shape.cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  check_launch(op, reinterpret_cast<const void*>(kernel), shape);
}
template <class... Parameters, class... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                  Arguments&&... arguments) {
  launch_early(op, kernel, LaunchShape{.grid = blocks, .threads = threads},
               std::forward<Arguments>(arguments)...);
}

}  // namespace qlab::cuda
