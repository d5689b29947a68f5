// From a resolved configuration to the things a run is made of: model, tokenizer, data, specs. What
// several trials share (files, the base model) is opened once.
#pragma once
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "data/dataset.h"
#include "experiments/config.h"
#include "experiments/evaluate.h"
#include "experiments/memory_log.h"
#include "nn/load.h"
#include "optim/optimizer.h"

namespace qlab {

WeightSpec weight_spec(const Config& config);
LoraSpec lora_spec(const Config& config);
AdamWConfig adamw_config(const Config& config);
/// Whether its optimizer's states may wait on the host.
bool is_paged(const Config& config);
Recompute recompute_of(const Config& config);
/// What model.streamed_layers asks for of a model of so many; auto: none.
int64_t streamed_layers(const Config& config, int64_t layers);
/// The longest sequence that a model takes. Random weights have learnt no positions: any length,
/// with the angles of the model's own rotary embedding.
int64_t most_positions(const std::string& path, const LlamaConfig& config);
/// What quant.compute_dtype means on the device. Unless said: fp32 on the CPU, bf16 on a GPU, fp16
/// on one that has no bf16. In a prediction (meta) the GPU it is made for decides.
DType compute_dtype(const Config& config, Device device);
/// The word for it in quant.compute_dtype.
std::string compute_dtype_word(DType compute);

/// How many examples of the set a trial trains on, those of later epochs counted again.
int64_t examples_to_train(const TrainConfig& config, const Dataset& data);
/// Evaluations from the one that may follow step `step` (from 1) on, where steps are left to take;
/// `every`: train.eval_every.
int64_t evaluations_left(int64_t step, int64_t total_steps, int64_t every);

/// How many random examples, and from which seed.
struct SyntheticSet {
  int64_t examples;
  uint64_t seed;
};
/// Enough that none repeats in a short run, and others that are never trained on.
inline constexpr SyntheticSet synthetic_train{4096, 0}, synthetic_eval{16, 1};

/// Ctrl-C before there is anything to save.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

/// Opens files once and keeps what was opened.
class Library {
 public:
  /// `stop` is asked again and again while files are read; true throws Interrupted.
  /// `shapes`: of models whose weights are not here, what their config.json says.
  explicit Library(std::function<bool()> stop = {}, bool shapes = false)
      : stop_(std::move(stop)), shapes_(shapes) {}
  const ModelSource& model(const std::string& path);
  /// Of the model at `path`; the first call reads all of it.
  const std::string& fingerprint(const std::string& path);
  const Tokenizer& tokenizer(const std::string& model_path);
  /// data.train and data.eval, files or "synthetic". Every id is in the model's vocabulary.
  const Dataset& train_set(const Config& config);
  const Dataset& eval_set(const Config& config);
  /// The loaded base, as it is after loading: nothing held expanded, no tables of positions. Only
  /// the last one is kept: trials that share it run one after another.
  Llama& base(const Config& config, DType compute, Device device);
  void drop_base();
  /// Of the loaded base, its streamed layers in host memory.
  int64_t streamed_bytes() const { return base_ ? base_->streamed_bytes() : 0; }
  /// Of the device that the last base was loaded to.
  MemoryLog& memory() { return *memory_; }
  /// What the loaded base alone gives on a set: every trial's evaluation before its first step,
  /// since a fresh adapter is the identity.
  std::map<const Dataset*, Evaluation>& base_evaluations() { return base_evaluations_; }

 private:
  /// `synthetic`: the set that the word stands for.
  const Dataset& dataset(const Config& config, const std::string& path, int64_t seq_len,
                         const SyntheticSet& synthetic);
  void check_stop() const {
    if (stop_ && stop_()) throw Interrupted();
  }

  std::function<bool()> stop_;
  bool shapes_;
  std::map<std::string, ModelSource> models_;
  std::map<std::string, std::string> fingerprints_;  // of models
  std::map<std::string, Tokenizer> tokenizers_;
  std::map<std::string, Dataset> datasets_;
  std::unique_ptr<MemoryLog> memory_;
  std::unique_ptr<Llama> base_;
  std::string base_key_;
  std::map<const Dataset*, Evaluation> base_evaluations_;
};

/// Trials with equal keys can train together on one base.
std::string base_key(const Config& config, DType compute, Device device);

}  // namespace qlab
