#include "experiments/memory_table_rows.h"

#include <algorithm>
#include <cmath>

#include "experiments/setup.h"

namespace qlab {
namespace {

/// What a tensor counts as; linear weights are the weights that have no other name.
const char* share_of(const LiveTensor& t) {
  switch (t.category) {
    case Category::weights:
      if (t.name.find("embed_tokens") != std::string::npos || t.name.starts_with("lm_head"))
        return share::embeddings;
      if (t.name == "held expanded") return "weights held expanded";
      return t.name.find("norm") != std::string::npos ? share::norms : share::linear;
    case Category::constants:
      if (t.name == "rotary_emb") return "rotary tables";
      if (t.name.find("dynamic map") != std::string::npos) return "code table of the scales";
      return t.kind.starts_with("uint8") ? share::scales8 : share::scales32;
    case Category::adapters:
      return t.kind.starts_with("float32") ? share::lora : "copies of LoRA in bf16";
    case Category::gradients:
      return share::gradients;
    case Category::optimizer:
      return share::optimizer;
    case Category::activations:
      return share::activations;
    case Category::workspace:
      break;
  }
  return "workspace";
}

void add(std::vector<Share>& shares, const std::string& name, double amount) {
  const auto same =
      std::find_if(shares.begin(), shares.end(), [&](const Share& s) { return s.name == name; });
  if (same == shares.end())
    shares.push_back({name, amount});
  else
    same->amount += amount;
}

/// The order in which shares stand in tables and bars.
constexpr const char* order[] = {share::linear,
                                 "weights held expanded",
                                 share::scales8,
                                 share::scales32,
                                 "code table of the scales",
                                 share::embeddings,
                                 share::norms,
                                 "rotary tables",
                                 share::lora,
                                 "copies of LoRA in bf16",
                                 share::gradients,
                                 share::optimizer,
                                 share::activations,
                                 "workspace"};

}  // namespace

namespace counted {
const Counted base{Category::weights, Category::constants};
const Counted adapters{Category::adapters};
const Counted trained{Category::adapters, Category::gradients, Category::optimizer};
const Counted base_and_adapters{Category::weights, Category::constants, Category::adapters};
const Counted outside_steps{Category::weights, Category::constants, Category::adapters,
                            Category::gradients, Category::optimizer};
const Counted inside_steps{Category::activations, Category::workspace};
const Counted everything{Category::weights,   Category::constants, Category::adapters,
                         Category::gradients, Category::optimizer, Category::activations,
                         Category::workspace};
}  // namespace counted

Weights::Weights(const std::string& model) : config(open_model(model).config) {
  const ModelCount count = count_parameters(config, {});
  linear = static_cast<double>(count.linear);
  embeddings = static_cast<double>(config.vocab_size * config.hidden_size *
                                   (config.tie_word_embeddings ? 1 : 2));
  norms = static_cast<double>(count.other) - embeddings;
  all = static_cast<double>(count.all());
}

double Weights::lora(int64_t r, const std::string& targets) const {
  LoraSpec spec;
  spec.r = r;
  spec.pattern = targets;
  return static_cast<double>(count_parameters(config, spec).trainable);
}

std::vector<Share> by_weight(const Weights& w, double linear, double other) {
  return {{share::linear, w.linear * linear},
          {share::embeddings, w.embeddings * other},
          {share::norms, w.norms * other}};
}

std::vector<Share> nf4_by_rule(const Weights& w, bool double_quant, double other) {
  std::vector<Share> shares = by_weight(w, 0.5, other);
  constexpr double block = 64, nested = 256;
  const double blocks = w.linear / block;
  if (double_quant)
    shares.insert(shares.begin() + 1,
                  {{share::scales8, blocks}, {share::scales32, blocks / nested * 4}});
  else
    shares.insert(shares.begin() + 1, {share::scales32, blocks * 4});
  return shares;
}

std::vector<Share> joined(std::vector<Share> a, const std::vector<Share>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::string arguments(const std::string& model, const std::vector<std::string>& sets) {
  std::string text = model;
  for (const std::string& set : sets) text += " --set " + set;
  return text;
}

const MemoryPrediction& RowMaker::prediction(const std::string& model,
                                             const std::vector<std::string>& sets) {
  const std::string key = arguments(model, sets);
  auto it = predictions_.find(key);
  if (it == predictions_.end()) {
    const Config config = load_config("", sets);
    const Device target = Device::cuda();
    const std::vector<PaperTrial> gang = {assumed_trial(config, target)};
    it = predictions_.emplace(key, predict_memory(open_model(model), gang, target)).first;
  }
  return it->second;
}

std::vector<Share> RowMaker::shares(const std::string& model, const std::vector<std::string>& sets,
                                    const Counted& counted) {
  const MemoryPrediction& p = prediction(model, sets);
  std::vector<Share> shares;
  for (const char* name : order)
    for (const LiveTensor& t : p.at_peak)
      if (share_of(t) == std::string(name) &&
          std::find(counted.begin(), counted.end(), t.category) != counted.end())
        add(shares, name, static_cast<double>(t.bytes));
  if (std::find(counted.begin(), counted.end(), Category::workspace) == counted.end())
    return shares;
  // The reservation counts what lies between its blocks as workspace.
  double live = 0;
  for (const LiveTensor& t : p.at_peak) live += static_cast<double>(t.bytes);
  const double gaps = static_cast<double>(p.peak()) - live;
  if (gaps != 0) add(shares, "gaps of the step's reservation", gaps);
  return shares;
}

MemoryRow RowMaker::row(const std::string& model, const std::vector<std::string>& sets,
                        const Counted& counted, MemoryRow row) {
  row.setting = arguments(model, sets);
  row.ours = shares(model, sets, counted);
  row.measured = measured(model, sets, counted);
  return row;
}

std::vector<Share> against_rule(std::vector<Share> ours, double parameters) {
  const auto lora =
      std::find_if(ours.begin(), ours.end(), [](const Share& s) { return s.name == share::lora; });
  if (lora == ours.end()) return ours;
  const double held = lora->amount / 4;
  lora->amount = 2 * parameters;
  ours.insert(lora + 1,
              {{"parameters that the rule does not count, 2 B each", 2 * (held - parameters)},
               {"LoRA weights in fp32, not 16 bits", 2 * held}});
  return ours;
}

}  // namespace qlab
