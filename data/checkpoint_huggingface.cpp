// A directory as Transformers writes it: config.json beside model.safetensors, or beside shards and
// the index that says which tensor is in which.
#include <filesystem>
#include <map>
#include <set>

#include "core/error.h"
#include "data/checkpoint_formats.h"
#include "data/json.h"
#include "data/safetensors.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

/// Transformers 5 spells rope_theta and rope_scaling as one object rope_parameters, and torch_dtype
/// as dtype.
void translate_to_version_4(nlohmann::json& config) {
  if (config.contains("dtype") && !config.contains("torch_dtype"))
    config["torch_dtype"] = config["dtype"];
  config.erase("dtype");
  const auto found = config.find("rope_parameters");
  if (found == config.end()) return;
  nlohmann::json rope = std::move(*found);
  config.erase(found);
  if (!rope.is_object()) return;
  if (rope.contains("rope_theta")) {
    config["rope_theta"] = rope["rope_theta"];
    rope.erase("rope_theta");
  }
  const bool scaled = rope.contains("rope_type") && rope["rope_type"] != "default";
  config["rope_scaling"] = scaled ? rope : nlohmann::json(nullptr);
}

nlohmann::json read_config(const fs::path& directory) {
  const std::string path = (directory / "config.json").string();
  if (!fs::exists(path)) {
    const bool adapter = fs::exists(directory / "adapter_config.json");
    fail("{}: there is no config.json; {}", directory.string(),
         adapter ? "this is an adapter, give its base model here"
                 : fetch_remedy(directory.string()));
  }
  nlohmann::json config = read_json_file(path);
  if (!config.is_object()) fail("{}: must be a JSON object", path);
  translate_to_version_4(config);
  return config;
}

class HuggingFaceDirectory final : public Checkpoint {
 public:
  explicit HuggingFaceDirectory(const std::string& directory)
      : Checkpoint(directory, read_config(directory)) {
    const fs::path single = fs::path(directory) / "model.safetensors";
    const fs::path index = fs::path(directory) / "model.safetensors.index.json";
    if (fs::exists(single)) {
      files_.emplace_back(single.string());
      for (const auto& [name, entry] : files_[0].entries()) file_of_[name] = 0;
    } else if (fs::exists(index)) {
      open_shards(index.string());
    } else {
      fail(
          "{}: there is neither model.safetensors nor model.safetensors.index.json (weights in "
          "other formats must be converted to safetensors); {}",
          directory, fetch_remedy(directory));
    }
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, file] : file_of_) result.push_back(name);
    return result;
  }
  bool contains(const std::string& name) const override { return file_of_.contains(name); }
  Shape shape(const std::string& name) const override {
    const SafetensorsFile& file = file_with(name);
    return to_shape(file.entries().at(name).shape,
                    fmt::format("{}: tensor \"{}\"", file.path(), name));
  }
  std::string source_dtype(const std::string& name) const override {
    return file_with(name).entries().at(name).dtype;
  }
  std::string file_of(const std::string& name) const override { return file_with(name).path(); }
  Tensor read(const std::string& name, DType dtype) const override {
    return file_with(name).read(name, dtype);
  }
  std::string fingerprint(const std::function<void()>& between_tensors) const override {
    Fingerprint result;
    result.add(config_.dump());
    for (const auto& [name, index] : file_of_) {
      const SafetensorsFile& file = files_[index];
      const SafetensorsEntry& entry = file.entries().at(name);
      result.add(name).add(entry.dtype).add(shape_text(entry.shape));
      between_tensors();
      result.add_in_blocks(file.bytes(name));
    }
    return result.hex();
  }

 private:
  const SafetensorsFile& file_with(const std::string& name) const {
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) fail("{}: there is no tensor \"{}\"", path_, name);
    return files_[found->second];
  }

  void open_shards(const std::string& index_path) {
    const nlohmann::json index = read_json_file(index_path);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
      fail("{}: must be an object with weight_map", index_path);
    std::map<std::string, size_t> opened;
    uint64_t total = 0;
    for (const auto& [name, value] : index["weight_map"].items()) {
      if (!value.is_string()) fail("{}: the file of \"{}\" must be a string", index_path, name);
      const auto file_name = value.get<std::string>();
      if (file_name.find('/') != std::string::npos)
        fail("{}: \"{}\" is not a file name in this directory", index_path, file_name);
      if (!opened.contains(file_name)) {
        const std::string shard = (fs::path(path_) / file_name).string();
        if (!fs::exists(shard))
          fail("{}: shard {} of {} is missing; {}", path_, file_name, index_path,
               fetch_remedy(path_));
        opened[file_name] = files_.size();
        files_.emplace_back(shard);
      }
      const SafetensorsFile& file = files_[opened[file_name]];
      if (!file.entries().contains(name))
        fail("{}: tensor \"{}\" is not in {}, where {} says it is", path_, name, file.path(),
             index_path);
      file_of_[name] = opened[file_name];
      total += file.bytes(name).size();
    }
    check_total(index, index_path, total);
  }

  static void check_total(const nlohmann::json& index, const std::string& index_path,
                          uint64_t total) {
    if (!index.contains("metadata") || !index["metadata"].is_object()) return;
    const auto& metadata = index["metadata"];
    if (!metadata.contains("total_size") || !metadata["total_size"].is_number()) return;
    if (metadata["total_size"].get<double>() != static_cast<double>(total))
      fail("{}: total_size is {}, the tensors have {} bytes", index_path,
           metadata["total_size"].dump(), total);
  }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> file_of_;
};

}  // namespace

std::optional<nlohmann::json> configuration_alone(const std::string& path) {
  const std::string found = resolve_model_path(path, true);
  if (!fs::is_directory(found)) return {};
  for (const auto& file : fs::directory_iterator(found))
    if (file.path().extension() == ".safetensors") return {};
  return read_config(found);
}

std::unique_ptr<Checkpoint> open_huggingface_directory(const std::string& directory) {
  return std::make_unique<HuggingFaceDirectory>(directory);
}

}  // namespace qlab
