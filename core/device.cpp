#include "core/device.h"

#include <fstream>

#include "core/error.h"
#include "core/parallel.h"

namespace qlab {

std::string Device::str() const {
  switch (type) {
    case DeviceType::cpu:
      return "cpu";
    case DeviceType::cuda:
      return fmt::format("cuda:{}", index);
    case DeviceType::meta:
      return target == DeviceType::cpu ? "meta(cpu)" : fmt::format("meta(cuda:{})", index);
  }
  return "?";
}

Device parse_device(std::string_view text) {
  if (text == "cpu") return Device::cpu();
  if (text == "auto") return cuda::device_count() > 0 ? Device::cuda(0) : Device::cpu();
  if (text == "cuda" || text.starts_with("cuda:")) {
    int index = 0;
    if (text.size() > 5) {
      for (const char c : text.substr(5)) {
        if (c < '0' || c > '9' || index > 99) fail("--device {}: not a GPU number", text);
        index = index * 10 + (c - '0');
      }
    } else if (text == "cuda:") {
      fail("--device cuda: needs a number after the colon");
    }
    const int count = cuda::device_count();
    if (cuda::build_version().empty())
      fail(
          "--device {}: this qlab was built without CUDA; install CUDA Toolkit 12.4 or newer and "
          "run make again, or use --device cpu",
          text);
    if (count == 0) fail("--device {}: no NVIDIA GPU found; use --device cpu", text);
    if (index >= count)
      fail("--device {}: this machine has {} GPU{} (0 to {})", text, count, count == 1 ? "" : "s",
           count - 1);
    return Device::cuda(index);
  }
  fail("--device {}: use auto, cpu, cuda or cuda:N", text);
}

void synchronize(Device device) {
  if (device.is_cuda()) cuda::synchronize();
}

int compute_capability(Device device) {
  if (device.capability != 0) return device.capability;
  return device.index < cuda::device_count() ? cuda::compute_capability(device.index) : 90;
}

bool supports_bf16(Device device) {
  if (device.target == DeviceType::cpu) return true;
  if (device.capability != 0) return device.capability >= 80;
  return device.index >= cuda::device_count() || cuda::supports_bf16(device.index);
}

std::string device_description(Device device) {
  if (device.capability != 0)
    return fmt::format("a GPU of compute capability {}.{}", device.capability / 10,
                       device.capability % 10);
  if (device.target == DeviceType::cuda) return cuda::device_name(device.index);
  std::ifstream file("/proc/cpuinfo");
  std::string line, name = "CPU";
  while (std::getline(file, line))
    if (line.starts_with("model name")) {
      name = line.substr(line.find(':') + 2);
      break;
    }
  return fmt::format("{} ({} threads)", name, thread_count());
}

}  // namespace qlab
