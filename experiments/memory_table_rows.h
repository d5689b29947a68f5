// What rows of memory tables are made of, private to memory_tables.cpp.
#pragma once
#include <map>

#include "experiments/memory_prediction.h"
#include "experiments/memory_tables.h"
#include "nn/module_tree.h"

namespace qlab {

// Names of shares that rules use too.
namespace share {
inline constexpr const char* linear = "linear weights";
inline constexpr const char* scales8 = "8-bit scales";
inline constexpr const char* scales32 = "fp32 scales";
inline constexpr const char* embeddings = "embeddings and head";
inline constexpr const char* norms = "norms (ours in fp32)";
inline constexpr const char* lora = "LoRA weights";
inline constexpr const char* gradients = "gradients";
inline constexpr const char* optimizer = "optimizer states";
inline constexpr const char* activations = "activations";
}  // namespace share

/// Categories that a row counts.
using Counted = std::vector<Category>;
namespace counted {
extern const Counted base, adapters, trained, base_and_adapters, outside_steps, inside_steps,
    everything;
}

/// A model's numbers of weights.
struct Weights {
  explicit Weights(const std::string& model);
  LlamaConfig config;
  double linear, embeddings, norms, all;
  /// Of all linears with rank r.
  double lora(int64_t r, const std::string& targets) const;
};

/// Bytes a weight of linears, and of all others.
std::vector<Share> by_weight(const Weights& w, double linear, double other);
/// Section 3 of QLoRA: NF4 in blocks of 64, scales in 8 bits, those in blocks of 256 with an fp32
/// scale; without double quantization an fp32 scale a block.
std::vector<Share> nf4_by_rule(const Weights& w, bool double_quant, double other);
std::vector<Share> joined(std::vector<Share> a, const std::vector<Share>& b);

/// Our side of rows: predictions, made once each, and measured runs.
class RowMaker {
 public:
  explicit RowMaker(std::vector<MeasuredRun> runs) : runs_(std::move(runs)) {}

  /// The row with our side: the model's run under `sets`, its bytes in `counted` at the peak.
  MemoryRow row(const std::string& model, const std::vector<std::string>& sets,
                const Counted& counted, MemoryRow row);
  /// Of a run that was recorded; nothing where there is none.
  std::optional<MeasuredBytes> measured(const std::string& model,
                                        const std::vector<std::string>& sets,
                                        const Counted& counted) const {
    return find_measured(runs_, model, sets, counted);
  }
  std::vector<Share> shares(const std::string& model, const std::vector<std::string>& sets,
                            const Counted& counted);
  const MemoryPrediction& prediction(const std::string& model,
                                     const std::vector<std::string>& sets);

 private:
  std::vector<MeasuredRun> runs_;
  std::map<std::string, MemoryPrediction> predictions_;
};

/// "synthetic:llama-7b --set lora.r=64"
std::string arguments(const std::string& model, const std::vector<std::string>& sets);
/// Shares with the fp32 LoRA weights split against a rule of `parameters` of 2 B.
std::vector<Share> against_rule(std::vector<Share> ours, double parameters);

// The tables.
MemoryTable llama31_8b_table(RowMaker& make);
MemoryTable llama2_7b_table(RowMaker& make);
MemoryTable full_finetune_table(RowMaker& make);
MemoryTable qlora_7b_table(RowMaker& make);
MemoryTable qlora_fig6_table(RowMaker& make);
MemoryTable qlora_section3_table(RowMaker& make);

}  // namespace qlab
