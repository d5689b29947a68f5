#include "nn/adapter_file.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/ops/copy.h"
#include "data/file.h"
#include "data/json.h"
#include "data/safetensors.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

std::string tensor_name(const std::string& module, const char* factor) {
  return "base_model.model." + module + "." + factor + ".weight";
}

std::string config_path(const std::string& dir) { return dir + "/adapter_config.json"; }
std::string weights_path(const std::string& dir) { return dir + "/adapter_model.safetensors"; }

const char* scaling(const LoraSpec& spec) { return spec.rslora ? "alpha/sqrt(r)" : "alpha/r"; }

// PEFT knows all-linear but not our other keywords, so names go into the file.
Json target_modules(const Adapter& adapter) {
  const LoraSpec& spec = adapter.spec();
  static const std::set<std::string> keywords = {"attention", "mlp", "all-linear", "qk", "qv"};
  if (!spec.pattern.empty() && !keywords.contains(spec.pattern)) return spec.pattern;
  std::set<std::string> names(spec.names.begin(), spec.names.end());
  if (!spec.pattern.empty())
    for (const Adapter::Shape& m : adapter.modules())
      names.insert(m.name.substr(m.name.rfind('.') + 1));
  return names;
}

}  // namespace

std::vector<std::pair<std::string, Tensor>> adapter_tensors(const Adapter& adapter) {
  const LoraSpec& spec = adapter.spec();
  const Tensor& parameters = adapter.parameters();
  const MemoryTag tag(Category::workspace);
  const Tensor host =
      parameters.to(parameters.device().is_meta() ? Device::cpu().meta() : Device::cpu());
  if (spec.dtype != DType::f32) synchronize(parameters.device());  // casts read it now
  std::vector<std::pair<std::string, Tensor>> tensors;
  int64_t offset = 0;
  for (const Adapter::Shape& m : adapter.modules()) {
    const auto take = [&](int64_t rows, int64_t cols) {
      const Tensor t = host.slice_rows(offset, offset + rows * cols).view({rows, cols});
      offset += rows * cols;
      return cast(t, spec.dtype);
    };
    tensors.emplace_back(tensor_name(m.name, "lora_A"), take(spec.r, m.in));
    tensors.emplace_back(tensor_name(m.name, "lora_B"), take(m.out, spec.r));
  }
  return tensors;
}

void save_adapter(const std::string& dir, const Adapter& adapter, const std::string& base) {
  std::filesystem::create_directories(dir);
  const LoraSpec& spec = adapter.spec();
  Json config = {{"alpha_pattern", Json::object()},
                 {"auto_mapping", nullptr},
                 {"base_model_name_or_path", base},
                 {"bias", "none"},
                 {"fan_in_fan_out", false},
                 {"inference_mode", true},
                 {"init_lora_weights", true},
                 {"layers_pattern", nullptr},
                 {"layers_to_transform", nullptr},
                 {"lora_dropout", spec.dropout},
                 {"modules_to_save", nullptr},
                 {"peft_type", "LORA"},
                 {"r", spec.r},
                 {"rank_pattern", Json::object()},
                 {"revision", nullptr},
                 {"target_modules", target_modules(adapter)},
                 {"task_type", "CAUSAL_LM"}};
  if (spec.rslora)
    config["use_rslora"] = true;  // older releases of PEFT stop at keys they do not know
  const auto whole = static_cast<int64_t>(spec.alpha);
  config["lora_alpha"] = static_cast<double>(whole) == spec.alpha ? Json(whole) : Json(spec.alpha);

  const auto tensors = adapter_tensors(adapter);
  synchronize(adapter.parameters().device());
  write_safetensors(weights_path(dir), tensors);
  write_file_atomically(config_path(dir), config.dump(2) + "\n");
}

LoraSpec read_adapter_spec(const std::string& dir) {
  const std::string path = config_path(dir);
  if (!std::filesystem::exists(path) && std::filesystem::exists(config_path(dir + "/adapter")))
    fail("{}: is a trial's directory; its adapter is {}/adapter", dir, dir);
  const Json json = read_json_file(path);
  if (!json.is_object()) fail("{}: must be a JSON object", path);
  const auto text = [&](const char* key) {
    return json.contains(key) ? json[key].dump() : std::string("nothing");
  };
  if (text("peft_type") != "\"LORA\"")
    fail("{}: peft_type must be LORA, got {}", path, text("peft_type"));
  const auto set = [&](const char* key) {
    if (!json.contains(key)) return false;
    const Json& v = json[key];
    return !(v.is_null() || (v.is_boolean() && !v.get<bool>()) ||
             ((v.is_object() || v.is_array()) && v.empty()));
  };
  for (const char* key :
       {"use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
        "layers_to_transform", "target_parameters", "trainable_token_indices", "modules_to_save",
        "exclude_modules", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora",
        "kasa_config", "velora_config", "monteclora_config", "fan_in_fan_out"})
    if (set(key)) fail("{}: {} is set, which qlab does not support", path, key);
  if (set("bias") && text("bias") != "\"none\"")
    fail("{}: bias {} is not supported; supported: none", path, text("bias"));
  LoraSpec spec;
  try {
    spec.r = json.at("r").get<int64_t>();
    spec.alpha = json.at("lora_alpha").get<double>();
    spec.dropout = json.value("lora_dropout", 0.0);
    spec.rslora = json.value("use_rslora", false);
    const Json& targets = json.at("target_modules");
    spec.pattern.clear();
    if (targets.is_string())
      spec.pattern = targets.get<std::string>();
    else
      spec.names = targets.get<std::vector<std::string>>();
  } catch (const Json::exception& error) {
    fail("{}: r, lora_alpha or target_modules is missing, or a value has the wrong type ({})", path,
         error.what());
  }
  if (spec.r <= 0) fail("{}: r must be positive, got {}", path, spec.r);
  return spec;
}

void check_adapter(const std::string& dir, const LoraSpec& spec,
                   const std::vector<Adapter::Shape>& modules) {
  const LoraSpec saved = read_adapter_spec(dir);
  if (saved.r != spec.r || saved.alpha != spec.alpha || saved.rslora != spec.rslora)
    fail(
        "{}: was saved with r {}, alpha {}, {} scaling, the run has r {}, alpha {}, {} scaling; "
        "set "
        "lora.r: {}, lora.alpha: {} and lora.scaling: {}",
        config_path(dir), saved.r, saved.alpha, scaling(saved), spec.r, spec.alpha, scaling(spec),
        saved.r, saved.alpha, scaling(saved));
  const SafetensorsFile file(weights_path(dir));
  std::set<std::string> left;
  for (const auto& [name, entry] : file.entries()) left.insert(name);
  const auto check = [&](const Adapter::Shape& m, const char* factor,
                         const std::vector<int64_t>& shape) {
    const std::string name = tensor_name(m.name, factor);
    if (left.erase(name) == 0)
      fail("{}: has no tensor {}; lora.targets does not fit this adapter", file.path(), name);
    const SafetensorsEntry& entry = file.entries().at(name);
    if (entry.shape != shape)
      fail("{}: {} is {}, the model and lora.r need {}", file.path(), name, shape_text(entry.shape),
           shape_text(shape));
  };
  for (const Adapter::Shape& m : modules) {
    check(m, "lora_A", {spec.r, m.in});
    check(m, "lora_B", {m.out, spec.r});
  }
  if (!left.empty())
    fail("{}: {} tensors have no module under lora.targets, for example {}", file.path(),
         left.size(), *left.begin());
}

void load_adapter(const std::string& dir, const Adapter& adapter) {
  check_adapter(dir, adapter.spec(), adapter.modules());
  const SafetensorsFile file(weights_path(dir));
  const MemoryTag tag(Category::workspace);
  const Tensor host = Tensor::empty({adapter.parameter_count()}, DType::f32, Device::cpu());
  int64_t offset = 0;
  for (const Adapter::Shape& m : adapter.modules())
    for (const char* factor : {"lora_A", "lora_B"}) {
      const std::string name = tensor_name(m.name, factor);
      const Tensor t = file.read(name, DType::f32);
      const float* values = t.data<float>();
      if (!std::all_of(values, values + t.numel(), [](float v) { return std::isfinite(v); }))
        fail(
            "{}: {} has values that are not finite; take an adapter from before its training "
            "diverged",
            file.path(), name);
      copy(host.slice_rows(offset, offset + t.numel()), t.view({t.numel()}));
      offset += t.numel();
    }
  copy(adapter.parameters(), host);
  synchronize(adapter.parameters().device());
  adapter.refresh();
}

}  // namespace qlab
