// qlab memory.
#include <filesystem>

#include "experiments/commands.h"
#include "experiments/memory_text.h"
#include "experiments/reservation.h"
#include "experiments/setup.h"
#include "experiments/sweep.h"
#include "experiments/terminal.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

bool is_yaml(const std::string& target) {
  return target.ends_with(".yaml") || target.ends_with(".yml");
}

/// The device that is predicted for. A GPU here has the memory it has; --gpu names another.
struct Target {
  Device device = Device::cuda();
  std::optional<GpuSpec> gpu;
  std::string name;
};

Target target_of(const std::string& gpu, const std::string& device) {
  Target target;
  if (!gpu.empty()) {
    if (device != "auto") fail("--gpu {} and --device {}: give one of them", gpu, device);
    target.gpu = find_gpu(gpu);
    target.name = target.gpu->name;
    return target;
  }
  if (device == "auto" && cuda::device_count() == 0) {
    target.name = "a GPU (--gpu names one)";
    return target;
  }
  target.device = parse_device(device);
  target.name = device_description(target.device);
  if (target.device.is_cuda()) {
    const auto total = static_cast<int64_t>(cuda::memory_info(target.device.index).total_bytes);
    target.gpu = find_gpu(std::to_string(total));
    target.gpu->name = target.name;
  }
  return target;
}

}  // namespace

int run_memory_command(const MemoryOptions& options, const CommonOptions& common) {
  const Target target = target_of(options.gpu, common.device);
  Config config;
  if (is_yaml(options.target)) {
    config = load_config(options.target, common.sets);
  } else {
    config = load_config("", common.sets);
    config.model.path = options.target;
  }
  const ModelSource model = open_model(config.model.path);
  const LoraSpec lora = lora_spec(config);
  MemoryQuestion question{config.model.path, target.name, target.gpu, 0, ""};
  question.footprint = hf_footprint(model.config, weight_spec(config),
                                    config.lora.present ? std::optional(lora) : std::nullopt);
  const std::vector<PaperTrial> gang(
      static_cast<size_t>(config.lora.present ? config.parallel.trials_per_gpu : 1),
      assumed_trial(config, target.device));
  const std::optional<int64_t> capacity =
      target.gpu ? std::optional(target.gpu->usable()) : std::nullopt;
  const MemoryPrediction prediction = predict_memory(model, gang, target.device, capacity);
  std::optional<Remedy> remedy;
  if (capacity && prediction.peak() > *capacity)
    remedy = cheapest_fit(model, gang, target.device, *capacity);
  if (options.json)
    write_out(memory_json(question, prediction, remedy).dump() + "\n");
  else
    write_out(memory_text(question, config, prediction, remedy));
  return 0;
}

}  // namespace qlab
