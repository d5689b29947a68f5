// Devices, and the ports through which everything above reaches CUDA. cuda/device.cu defines them;
// without a CUDA compiler cuda/unavailable.cpp does, and reports no device.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace qlab {

enum class DeviceType : uint8_t { cpu, cuda, meta };

/// Where a tensor lives. A meta tensor has a shape and bytes but no memory; it stands for the
/// device `target`, since scratch and workspace depend on that.
struct Device {
  DeviceType type = DeviceType::cpu;
  DeviceType target = DeviceType::cpu;  // equals type unless type is meta
  int8_t index = 0;
  uint8_t capability =
      0;  // of a GPU that is named, not here: 75 for 7.5; 0: as the one here has it

  static Device cpu() { return {}; }
  static Device cuda(int index = 0) {
    return {DeviceType::cuda, DeviceType::cuda, static_cast<int8_t>(index)};
  }
  /// What a prediction for a GPU of this compute capability runs for, on meta.
  static Device gpu(int capability) {
    return {DeviceType::cuda, DeviceType::cuda, 0, static_cast<uint8_t>(capability)};
  }
  Device meta() const { return {DeviceType::meta, target, index, capability}; }

  bool is_cpu() const { return type == DeviceType::cpu; }
  bool is_cuda() const { return type == DeviceType::cuda; }
  bool is_meta() const { return type == DeviceType::meta; }
  bool operator==(const Device&) const = default;
  std::string str() const;  // "cpu", "cuda:0", "meta(cuda:0)"
};

/// "cpu", "cuda", "cuda:N", or "auto" (the first GPU where there is one). Error when absent.
Device parse_device(std::string_view text);

/// Runs the port of the device; a meta device runs neither.
template <class Cpu, class Cuda>
void on_device(Device device, Cpu&& cpu, Cuda&& cuda) {
  if (device.is_cpu()) cpu();
  if (device.is_cuda()) cuda();
}

/// Blocks until everything issued on the device has finished. Never called inside a step.
void synchronize(Device device);

/// "AMD EPYC ... (2 threads)" or "NVIDIA H100 80GB HBM3".
std::string device_description(Device device);

/// Ten times the major and the minor number, 86 for 8.6, of the GPU that the device is or stands
/// for; of one here what this program's code for it was written for, if that is less. 90 where
/// nobody says.
int compute_capability(Device device);
/// Products of bf16: a CPU, and GPUs from compute capability 8.0 on.
bool supports_bf16(Device device);

namespace cuda {

struct MemoryInfo {
  size_t free_bytes, total_bytes;
};

int device_count();           // 0 when built without CUDA or no GPU is there
std::string build_version();  // CUDA toolkit version, or "" when built without
std::string device_name(int index);
// Of a GPU that is there.
bool supports_bf16(int index);
int compute_capability(int index);
MemoryInfo memory_info(int index);
void set_device(int index);
void* allocate(size_t bytes, int index);  // nullptr when it does not fit
void release(void* pointer, int index);
void* allocate_pinned(size_t bytes);  // page-locked host memory; nullptr when it does not fit
void release_pinned(void* pointer);
/// Copies in stream order, either direction; asynchronous for pinned host memory.
void copy_async(void* destination, const void* source, size_t bytes);
/// The same from the host, where `source` may be pageable: it has been read when this returns.
void upload(void* destination, const void* source, size_t bytes);
/// Rows of `row_bytes`, pitches in bytes; in stream order.
void copy_rows(void* destination, size_t destination_pitch, const void* source, size_t source_pitch,
               size_t row_bytes, size_t rows);
void fill_zero(void* pointer, size_t pitch, size_t row_bytes, size_t rows);
void synchronize();

/// Work of the current device's stream, recorded once and replayed with one launch. Addresses are
/// part of the recording.
class Graph {
 public:
  /// Records what `issue` issues, which must not synchronize or allocate.
  explicit Graph(const std::function<void()>& issue);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch() const;

 private:
  void* executable_ = nullptr;
};

/// A stream for copies that run beside the device's own.
class CopyStream {
 public:
  CopyStream();
  ~CopyStream();
  CopyStream(const CopyStream&) = delete;
  CopyStream& operator=(const CopyStream&) = delete;
  /// Between the device and page-locked host memory.
  void copy(void* destination, const void* source, size_t bytes);

 private:
  friend class Event;
  void* stream_ = nullptr;
};

/// A moment in a stream, by default the device's own.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(const CopyStream* stream = nullptr);
  /// What is issued to the stream from now on begins after the moment that was recorded last.
  void wait(const CopyStream* stream = nullptr) const;
  /// Negative where this one came later; waits for both.
  double seconds_until(const Event& later) const;

 private:
  void* event_ = nullptr;
};

/// The device's own clock around what is issued between start() and seconds().
class Stopwatch {
 public:
  Stopwatch();
  ~Stopwatch();
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  void start();
  double seconds();  // waits for the device

 private:
  void* begin_ = nullptr;
  void* end_ = nullptr;
};

}  // namespace cuda
}  // namespace qlab
