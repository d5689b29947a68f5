// A model on disk, in one of the forms people have: a Hugging Face directory, a hub id in the local
// cache, or a GGUF file. All are read through Hugging Face's names and configuration keys.
#pragma once
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace qlab {

class Checkpoint {
 public:
  virtual ~Checkpoint() = default;
  /// DIR with config.json and model.safetensors (single or sharded with its index), FILE.gguf, or a
  /// hub id whose files lie in the local cache. Headers are read and checked in full, data is not.
  static std::unique_ptr<Checkpoint> open(const std::string& path);

  /// In config.json's spelling of Transformers 4: rope_theta and rope_scaling, torch_dtype.
  const nlohmann::json& config() const { return config_; }
  /// Where the files were found.
  const std::string& path() const { return path_; }

  virtual std::vector<std::string> names() const = 0;  // sorted
  virtual bool contains(const std::string& name) const = 0;
  virtual Shape shape(const std::string& name) const = 0;
  virtual std::string source_dtype(const std::string& name) const = 0;     // "BF16", "Q4_1", ...
  virtual std::string file_of(const std::string&) const { return path_; }  // that holds a tensor
  /// A contiguous copy on the CPU, in f64, f32 or bf16.
  virtual Tensor read(const std::string& name, DType dtype) const = 0;
  /// Error naming file and tensor when it is missing or has another shape than the model needs.
  void check(const std::string& name, const Shape& expected) const;
  /// check() and read().
  Tensor read(const std::string& name, const Shape& expected, DType dtype) const;
  /// What each rotary frequency is divided by, [head_dim / 2]; empty when the file has none. Only
  /// GGUF carries them, in place of the llama3 rope scaling.
  virtual std::vector<float> rope_divisors() const { return {}; }
  /// Of configuration, names, dtypes, shapes and every byte of the tensors, which are read for it.
  /// `between_tensors` may throw, which ends the reading.
  virtual std::string fingerprint(const std::function<void()>& between_tensors = [] {}) const = 0;

 protected:
  Checkpoint(std::string path, nlohmann::json config)
      : path_(std::move(path)), config_(std::move(config)) {}

  std::string path_;
  nlohmann::json config_;
};

/// The directory or file that `path` stands for: itself when it exists, else a snapshot of that hub
/// id in the local cache (HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub). Error with the
/// command that downloads it when there is none; for a prediction (`shapes`) less of it will do.
std::string resolve_model_path(const std::string& path, bool shapes = false);

/// The configuration of a directory, or hub id, that has config.json and no weights yet.
std::optional<nlohmann::json> configuration_alone(const std::string& path);

/// What to do about a model directory that lacks a file: the .gguf files that it has; or the
/// command that fetches the whole where the directory is a snapshot of the hub's cache.
std::string fetch_remedy(const std::string& directory);

bool is_gguf_path(const std::string& path);

}  // namespace qlab
