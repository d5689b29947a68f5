#include "core/device.h"

#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "cuda/early_launch.cuh"

namespace qlab::cuda {
namespace {

constexpr int max_devices = 64;

int current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  QLAB_CHECK(index < max_devices, "at most {} GPUs are supported, asked for number {}", max_devices,
             index);
  return index;
}

/// Makes a device current in its scope.
class DeviceScope {
 public:
  explicit DeviceScope(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != index;
    if (changed_) set_device(index);
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// nullptr when the memory does not fit. The runtime remembers an error until it is read.
void* pointer_or_null(void* pointer, cudaError_t status, const char* call) {
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(status, call);
  return pointer;
}

// For code_architecture() to ask about.
__global__ void probe_kernel() {}

#if defined(QLAB_SYNC_LAUNCHES)
constexpr bool synchronous = true;
constexpr const char* which_kernel = "";
#else
constexpr bool synchronous = false;
constexpr const char* which_kernel =
    ". To learn which kernel did it, build the preset that waits for each (`cmake --preset dev && "
    "cmake --build --preset dev`) and run the same command with build-dev/qlab";
#endif

/// What a kernel did, which whoever asks next is told; the device is of no use to this process
/// then.
bool is_fault(cudaError_t status) {
  switch (status) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
      return true;
    default:
      return false;
  }
}

/// As it stands in the source, with its template arguments.
std::string name_of(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) {
    cudaGetLastError();
    return "a kernel";
  }
  const std::unique_ptr<char, decltype(&std::free)> plain(
      abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr), &std::free);
  return plain != nullptr ? plain.get() : mangled;
}

}  // namespace

cudaStream_t current_stream() {
  static std::mutex mutex;
  static std::array<cudaStream_t, max_devices> streams{};
  const int index = current_device();
  const std::lock_guard lock(mutex);
  if (streams[index] == nullptr)
    check(cudaStreamCreateWithFlags(&streams[index], cudaStreamNonBlocking), "cudaStreamCreate");
  return streams[index];
}

int code_architecture() {
  static std::mutex mutex;
  static std::array<int, max_devices> known{};
  int& architecture = known[static_cast<size_t>(current_device())];
  const std::lock_guard lock(mutex);
  if (architecture == 0) {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      fail(
          "{}: this qlab was built for other GPUs; run `make` on the machine that has this one. "
          "GPUs of compute capability 7.5 and newer are supported",
          device_name(current_device()));
    }
    check(status, "cudaFuncGetAttributes");
    architecture = attributes.ptxVersion;
  }
  return architecture;
}

bool supports_bf16(int index) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
        "cudaDeviceGetAttribute");
  return major >= 8;
}

int multiprocessor_count() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
        "cudaDeviceGetAttribute");
  return count;
}

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail("CUDA: {} failed: {} ({}){}", call, cudaGetErrorString(status), cudaGetErrorName(status),
       is_fault(status) ? which_kernel : "");
}

void check_launch(const char* op, const void* kernel, const LaunchShape& shape) {
  cudaError_t status = cudaGetLastError();
  if (synchronous && status == cudaSuccess) status = cudaStreamSynchronize(current_stream());
  if (status == cudaSuccess) return;
  if (is_fault(status) && !synchronous) check(status, "a kernel that was launched earlier");
  cudaGetLastError();
  fail(
      "CUDA: [{}] {} failed: {} ({}); {} x {} x {} blocks of {} threads, {} bytes of shared memory",
      op, name_of(kernel), cudaGetErrorString(status), cudaGetErrorName(status), shape.grid.x,
      shape.grid.y, shape.grid.z, shape.threads, shape.shared_bytes);
}

unsigned grid_of(const char* op, int64_t blocks) {
  QLAB_CHECK(blocks > 0 && blocks <= INT32_MAX, "[{}] the tensor is too large for one launch", op);
  return static_cast<unsigned>(blocks);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string build_version() {
  return fmt::format("{}.{}", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
}

int compute_capability(int index) {
  const DeviceScope scope(index);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
        "cudaDeviceGetAttribute");
  return std::min(10 * major + minor, code_architecture());
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  return properties.name;
}

MemoryInfo memory_info(int index) {
  const DeviceScope scope(index);
  MemoryInfo info{};
  check(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), "cudaMemGetInfo");
  return info;
}

void set_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

void* allocate(size_t bytes, int index) {
  const DeviceScope scope(index);
  void* pointer = nullptr;
  const cudaError_t status = cudaMalloc(&pointer, bytes == 0 ? 1 : bytes);
  return pointer_or_null(pointer, status, "cudaMalloc");
}

// Runs in destructors, also while the process ends: a status has nowhere to go.
void release(void* pointer, int) { cudaFree(pointer); }

void copy_async(void* destination, const void* source, size_t bytes) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, current_stream()),
        "cudaMemcpyAsync");
}

void copy_rows(void* destination, size_t destination_pitch, const void* source, size_t source_pitch,
               size_t row_bytes, size_t rows) {
  if (row_bytes == 0 || rows == 0) return;
  check(cudaMemcpy2DAsync(destination, destination_pitch, source, source_pitch, row_bytes, rows,
                          cudaMemcpyDefault, current_stream()),
        "cudaMemcpy2DAsync");
}

void fill_zero(void* pointer, size_t pitch, size_t row_bytes, size_t rows) {
  if (row_bytes == 0 || rows == 0) return;
  if (rows == 1)
    check(cudaMemsetAsync(pointer, 0, row_bytes, current_stream()), "cudaMemsetAsync");
  else
    check(cudaMemset2DAsync(pointer, pitch, 0, row_bytes, rows, current_stream()),
          "cudaMemset2DAsync");
}

void synchronize() { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

Graph::Graph(const std::function<void()>& issue) {
  const cudaStream_t stream = current_stream();
  cudaGraph_t graph = nullptr;
  // A graph starts when all before it has ended, and what it records has not happened yet.
  const bool outside = writes_read_early().exchange(false);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  try {
    issue();
  } catch (...) {
    if (cudaStreamEndCapture(stream, &graph) == cudaSuccess && graph != nullptr)
      cudaGraphDestroy(graph);
    cudaGetLastError();
    writes_read_early() = outside;
    throw;
  }
  writes_read_early() = outside;
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  executable_ = executable;
}

Graph::~Graph() { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)); }

void Graph::launch() const {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), current_stream()),
        "cudaGraphLaunch");
}

CopyStream::CopyStream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  stream_ = stream;
}
CopyStream::~CopyStream() { cudaStreamDestroy(static_cast<cudaStream_t>(stream_)); }

void CopyStream::copy(void* destination, const void* source, size_t bytes) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault,
                        static_cast<cudaStream_t>(stream_)),
        "cudaMemcpyAsync");
}

Event::Event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "cudaEventCreate");
  event_ = event;
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(event_)); }

void Event::record(const CopyStream* stream) {
  check(cudaEventRecord(
            static_cast<cudaEvent_t>(event_),
            stream == nullptr ? current_stream() : static_cast<cudaStream_t>(stream->stream_)),
        "cudaEventRecord");
}
void Event::wait(const CopyStream* stream) const {
  check(cudaStreamWaitEvent(
            stream == nullptr ? current_stream() : static_cast<cudaStream_t>(stream->stream_),
            static_cast<cudaEvent_t>(event_), 0),
        "cudaStreamWaitEvent");
}
double Event::seconds_until(const Event& later) const {
  const auto begin = static_cast<cudaEvent_t>(event_), end = static_cast<cudaEvent_t>(later.event_);
  check(cudaEventSynchronize(begin), "cudaEventSynchronize");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  return 1e-3 * static_cast<double>(milliseconds);
}

Stopwatch::Stopwatch() {
  cudaEvent_t begin = nullptr, end = nullptr;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  begin_ = begin;
  check(cudaEventCreate(&end), "cudaEventCreate");
  end_ = end;
}

Stopwatch::~Stopwatch() {
  cudaEventDestroy(static_cast<cudaEvent_t>(begin_));
  cudaEventDestroy(static_cast<cudaEvent_t>(end_));
}

void Stopwatch::start() {
  check(cudaEventRecord(static_cast<cudaEvent_t>(begin_), current_stream()), "cudaEventRecord");
}

double Stopwatch::seconds() {
  const auto begin = static_cast<cudaEvent_t>(begin_), end = static_cast<cudaEvent_t>(end_);
  check(cudaEventRecord(end, current_stream()), "cudaEventRecord");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  return 1e-3 * static_cast<double>(milliseconds);
}

}  // namespace qlab::cuda
