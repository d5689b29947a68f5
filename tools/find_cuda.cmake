# Decides whether the CUDA part is built. Sets QLAB_CUDA_VERSION ("" when it is not) and says why.
set(QLAB_CUDA_VERSION "")
set(qlab_cuda_minimum 12.4)

function(qlab_without_cuda reason)
  if(QLAB_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QLAB_CUDA=ON, but ${reason}.")
  endif()
  message(STATUS "Without CUDA: ${reason}. The program will run on the CPU.")
endfunction()

if(NOT QLAB_CUDA)
  message(STATUS "Without CUDA: QLAB_CUDA=${QLAB_CUDA}. The program will run on the CPU.")
  return()
endif()

find_program(QLAB_NVCC NAMES $ENV{CUDACXX} nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
             PATHS /usr/local/cuda/bin)
if(NOT QLAB_NVCC)
  qlab_without_cuda("no nvcc was found (CUDA Toolkit ${qlab_cuda_minimum} or newer; set CUDACXX to \
its nvcc where it is not in PATH or /usr/local/cuda)")
  return()
endif()
execute_process(COMMAND ${QLAB_NVCC} --version OUTPUT_VARIABLE qlab_nvcc_text ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${qlab_nvcc_text}")
set(qlab_nvcc_version "${CMAKE_MATCH_1}")
if(NOT qlab_nvcc_version OR qlab_nvcc_version VERSION_LESS qlab_cuda_minimum)
  qlab_without_cuda("${QLAB_NVCC} is version '${qlab_nvcc_version}', and ${qlab_cuda_minimum} or \
newer is needed")
  return()
endif()

# One small program shows whether this nvcc, the C++ compiler and cuBLAS fit together.
if(NOT QLAB_NVCC_WORKS STREQUAL QLAB_NVCC)
  set(probe ${CMAKE_BINARY_DIR}/generated/cuda_probe)
  file(WRITE ${probe}.cu "#include <concepts>\n#include <cublasLt.h>\n#include <cublas_v2.h>\n"
       "template <std::integral T> __global__ void kernel(T* x) { *x = 1; }\n"
       "int main() { kernel<int><<<1, 1>>>(nullptr); return cublasLtGetVersion() == 0; }\n")
  execute_process(COMMAND ${QLAB_NVCC} -std=c++20 -o ${probe} ${probe}.cu -lcublasLt -lcublas
                  RESULT_VARIABLE result OUTPUT_VARIABLE log ERROR_VARIABLE log)
  file(WRITE ${probe}.log "${log}")
  if(NOT result EQUAL 0)
    qlab_without_cuda("${QLAB_NVCC} ${qlab_nvcc_version} cannot build a small cuBLAS program; its \
messages are in ${probe}.log")
    return()
  endif()
  set(QLAB_NVCC_WORKS ${QLAB_NVCC} CACHE INTERNAL "")
endif()

# By default the GPU that is here, or Hopper: every further architecture costs build time.
if(NOT QLAB_CUDA_ARCHITECTURES)
  set(capability 9.0)
  find_program(QLAB_NVIDIA_SMI nvidia-smi)
  if(QLAB_NVIDIA_SMI)
    execute_process(COMMAND ${QLAB_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE listed ERROR_QUIET)
    if(listed MATCHES "^([0-9]+\\.[0-9]+)")
      set(capability ${CMAKE_MATCH_1})
    endif()
  endif()
  string(REPLACE "." "" architecture ${capability})
  if(architecture EQUAL 90)
    set(architecture 90a)
  endif()
  set(QLAB_CUDA_ARCHITECTURES ${architecture}-real CACHE STRING
      "GPU architectures, as in CMAKE_CUDA_ARCHITECTURES" FORCE)
endif()
set(CMAKE_CUDA_ARCHITECTURES ${QLAB_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_COMPILER ${QLAB_NVCC})
enable_language(CUDA)
find_package(CUDAToolkit ${qlab_cuda_minimum} REQUIRED)
set(QLAB_CUDA_VERSION ${qlab_nvcc_version})
message(STATUS "CUDA ${QLAB_CUDA_VERSION} (${QLAB_NVCC}) for ${QLAB_CUDA_ARCHITECTURES}")
