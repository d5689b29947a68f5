#include "experiments/gpus.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <iterator>
#include <limits>

#include "core/error.h"
#include "core/host_memory.h"
#include "core/memory.h"
#include "experiments/config_fields.h"

namespace qlab {
namespace {

// What no allocation can have: the driver's reserve, a CUDA context, the kernels' code and the
// libraries. `make gpu-bench PART=memory` prints it, by a training of SmolLM2-135M's shapes.
struct Row {
  const char* name;
  int capability;                       // by NVIDIA's list of CUDA GPUs
  int64_t mib;                          // total memory in nvidia-smi
  std::optional<int64_t> context = {};  // MiB, where it was measured
};
constexpr int64_t h100_context = 1024, assumed_context = 600;
constexpr Row rows[] = {{"h100-80gb", 90, 81559, h100_context},
                        {"h200", 90, 143771},
                        {"a100-40gb", 80, 40960},
                        {"a100-80gb", 80, 81920},
                        {"l40s", 89, 46068},
                        {"l4", 89, 23034},
                        {"a10g", 86, 23028},
                        {"rtx3090", 86, 24576},
                        {"rtx4090", 89, 24564},
                        {"rtx5090", 120, 32607},
                        {"t4", 75, 15360}};
constexpr const char* not_measured = "assumed: not measured on this GPU";
constexpr const char* bytes_wanted =
    "bytes, for example 24GiB or 9.2GB (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)";

GpuSpec spec_of(const Row& row) {
  return {row.name,
          row.mib << 20,
          row.capability,
          row.context.has_value(),
          row.context.value_or(assumed_context) << 20,
          row.context ? "measured on this GPU" : not_measured};
}

int64_t checked(const char* option, const std::string& text, int64_t bytes) {
  if (const std::string missing = missing_unit(text); !missing.empty())
    fail("{} {}: these are bytes, and too few; {}", option, text, missing);
  return bytes;
}

/// "out of range" of a number with a unit of bytes, otherwise `wrong`.
std::string problem_of(const std::string& text, const std::string& wrong) {
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [unit, error] = std::from_chars(text.data(), end, value);
  const bool number = error == std::errc() && parse_bytes("1" + std::string(unit, end));
  return number ? "out of range" : wrong;
}

/// "; did you mean a100-40gb or a100-80gb?"
std::string meant(const std::string& name) {
  std::vector<std::string> names, all;
  for (const Row& row : rows) {
    all.emplace_back(row.name);
    if (std::string(row.name).starts_with(name + "-")) names.emplace_back(row.name);
  }
  if (const std::string near = nearest(name, all); names.empty() && !near.empty())
    names.push_back(near);
  return names.empty() ? "" : fmt::format("; did you mean {}?", fmt::join(names, " or "));
}

}  // namespace

std::string known_gpus() {
  std::string names;
  for (const Row& row : rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

GpuSpec find_gpu(const std::string& text) {
  std::string name = text;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const Row* row =
      std::find_if(std::begin(rows), std::end(rows), [&](const Row& r) { return name == r.name; });
  if (row != std::end(rows)) return spec_of(*row);
  const auto times = name.find_first_not_of("0123456789");
  if (times != std::string::npos && times > 0 && name[0] != '0' && name[times] == 'x')
    fail(
        "--gpu {}: give one GPU: no model is divided among several, and of a run with --replicas "
        "each holds the whole",
        text);
  const auto bytes = parse_bytes(text);
  if (!bytes || *bytes == 0)
    fail("--gpu {}: {}{}; known are {}, or give its memory as {}", text,
         problem_of(text, "unknown"), meant(name), known_gpus(), bytes_wanted);
  return {.name = text,
          .memory_bytes = checked("--gpu", text, *bytes),
          .context_bytes = assumed_context << 20,
          .context_note = not_measured};
}

int64_t parse_device_memory(const std::string& text) {
  const auto bytes = parse_bytes(text);
  if (!bytes || *bytes == 0)
    fail("--device-memory {}: {}; give {}", text, problem_of(text, "no number of bytes"),
         bytes_wanted);
  return checked("--device-memory", text, *bytes);
}

int64_t parse_host_memory(const std::string& text) {
  const auto bytes = parse_bytes(text);
  if (!bytes)
    fail("--host-memory {}: {}; give {}", text, problem_of(text, "no number of bytes"),
         bytes_wanted);
  return checked("--host-memory", text, *bytes);
}

void limit_target(MemoryTarget& target, const std::string& bytes) {
  target.limit = parse_device_memory(bytes);
  target.capacity = std::min(*target.limit, target.capacity.value_or(*target.limit));
}

RatesOrigin rates_origin(const MemoryTarget& target) {
  if (!target.device.is_cuda()) return {"other_cpu", "at the rates of an AMD EPYC's cores"};
  if (target.rates.measured) return {"measured", "from rates measured on this GPU"};
  if (target.rates.by_datasheet)
    return {"datasheet", "from its datasheet, by an H100's measured rates"};
  const bool here = target.gpu && target.gpu->measured;
  return {"h100", here ? "at an H100's rates: this card's are not known"
                       : "at an H100's rates: no card is named"};
}

std::string barely_text(const MemoryTarget& target, int64_t peak) {
  if (!target.gpu || target.gpu->measured) return "";
  constexpr int64_t doubt = (h100_context - assumed_context) << 20;
  const int64_t left = target.gpu->usable() - peak;
  if (left < 0 || left >= doubt) return "";
  return fmt::format("barely: {} free, and the context is assumed: an H100's takes {} more",
                     format_bytes(left), format_bytes(doubt));
}

MemoryTarget target_here(Device device, int64_t replicas) {
  MemoryTarget target{device, device_description(device), {}, {}, rates_of(device)};
  target.replicas = replicas;
  const int64_t held = memory_account(device).total;
  int64_t free = available_memory(device);
  if (!device.is_cuda()) free = std::min(free, available_host_memory() / replicas);
  constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();
  if (free < unlimited - held) target.capacity = free + held;
  if (device.is_cuda()) {
    target.host = available_memory(Device::cpu()) / replicas + memory_account(Device::cpu()).total;
    const auto total = static_cast<int64_t>(cuda::memory_info(device.index).total_bytes);
    target.gpu = GpuSpec{target.name,
                         total,
                         compute_capability(device),
                         true,
                         total - target.capacity.value_or(total),
                         "and other programs, now"};
  }
  return target;
}

MemoryTarget memory_target(const std::string& gpu, const std::string& device) {
  if (!gpu.empty() && device != "auto")
    fail("--gpu {} and --device {}: give one of them", gpu, device);
  if (gpu.empty() && (device != "auto" || cuda::device_count() > 0))
    return target_here(parse_device(device));
  MemoryTarget target{Device::cuda(), "a GPU", {}, {}, gpu_rates(gpu)};
  if (gpu.empty()) {
    target.note =
        "no GPU is here: this is for one without a limit (--gpu names one), and train and sweep "
        "would take the CPU, for which --device cpu predicts";
    return target;
  }
  target.gpu = find_gpu(gpu);
  target.device = Device::gpu(target.gpu->capability);
  target.name = target.gpu->name;
  target.capacity = target.gpu->usable();
  return target;
}

}  // namespace qlab
