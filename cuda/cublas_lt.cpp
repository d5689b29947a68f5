// cuBLASLt, loaded at the first product: its code takes 200 MB of host memory and a program's start
// 0.07 s, and most commands multiply nothing on a GPU. The functions of cublasLt.h that are used,
// each handing its call on.
#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

#include "core/error.h"

namespace qlab::cuda {
namespace {

void* symbol(const char* name) {
  static void* const library = [] {
    const std::string file = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* const handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
      fail(
          "cannot load {}: {}. It is part of the CUDA Toolkit {} that qlab was built with; "
          "LD_LIBRARY_PATH may name its folder",
          file, dlerror(), CUBLAS_VER_MAJOR);
    return handle;
  }();
  void* const address = dlsym(library, name);
  if (address == nullptr) fail("libcublasLt has no function {}: {}", name, dlerror());
  return address;
}

template <class Function>
Function* function(const char* name) {
  return reinterpret_cast<Function*>(symbol(name));
}

}  // namespace
}  // namespace qlab::cuda

#define QLAB_HAND_ON(result, name, parameters, arguments)                    \
  extern "C" result name parameters {                                        \
    static auto* const loaded = qlab::cuda::function<decltype(name)>(#name); \
    return loaded arguments;                                                 \
  }

QLAB_HAND_ON(cublasStatus_t, cublasLtCreate, (cublasLtHandle_t * handle), (handle))
QLAB_HAND_ON(const char*, cublasLtGetStatusString, (cublasStatus_t status), (status))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulDescInit_internal,
             (cublasLtMatmulDesc_t desc, size_t size, cublasComputeType_t compute,
              cudaDataType_t scale),
             (desc, size, compute, scale))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulDescSetAttribute,
             (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
              const void* value, size_t size),
             (desc, attribute, value, size))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatrixLayoutInit_internal,
             (cublasLtMatrixLayout_t layout, size_t size, cudaDataType type, uint64_t rows,
              uint64_t cols, int64_t pitch),
             (layout, size, type, rows, cols, pitch))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatrixLayoutSetAttribute,
             (cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
              const void* value, size_t size),
             (layout, attribute, value, size))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulPreferenceInit_internal,
             (cublasLtMatmulPreference_t preference, size_t size), (preference, size))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulPreferenceSetAttribute,
             (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
              const void* value, size_t size),
             (preference, attribute, value, size))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulAlgoGetHeuristic,
             (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
              cublasLtMatmulPreference_t preference, int requested,
              cublasLtMatmulHeuristicResult_t* results, int* found),
             (handle, desc, a, b, c, d, preference, requested, results, found))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulAlgoConfigGetAttribute,
             (const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute,
              void* value, size_t size, size_t* written),
             (algorithm, attribute, value, size, written))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmulAlgoCheck,
             (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
              const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result),
             (handle, desc, a, b, c, d, algorithm, result))
QLAB_HAND_ON(cublasStatus_t, cublasLtMatmul,
             (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
              cublasLtMatrixLayout_t layout_a, const void* b, cublasLtMatrixLayout_t layout_b,
              const void* beta, const void* c, cublasLtMatrixLayout_t layout_c, void* d,
              cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t* algorithm,
              void* workspace, size_t workspace_bytes, cudaStream_t stream),
             (handle, desc, alpha, a, layout_a, b, layout_b, beta, c, layout_c, d, layout_d,
              algorithm, workspace, workspace_bytes, stream))
