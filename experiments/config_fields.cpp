#include "experiments/config_fields.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/error.h"

namespace qlab {
namespace {

Range at_least(double low) { return {.low = low}; }
Range above(double low) { return {.low = low, .low_open = true}; }
const Range kFraction{.low = 0, .high = 1, .high_open = true};

/// Hugging Face's names of optimizers.
const std::vector<std::pair<std::string, const char*>> kOptimizers{
    {"adamw_torch", "adamw"},
    {"adamw_torch_fused", "adamw"},
    {"adamw_8bit", "adamw8bit"},
    {"adamw_bnb_8bit", "adamw8bit"},
    {"paged_adamw_32bit", "paged_adamw"},
    {"paged_adamw_8bit", "paged_adamw8bit"}};

#define QLAB_SLOT(member) [](Config& c) -> FieldSlot { return &c.member; }

std::vector<Field> make_fields() {
  const auto none = Effect::none;
  const auto numbers = Effect::numbers;
  return {
      {.key = "model.path",
       .slot = QLAB_SLOT(model.path),
       .meaning = "the base: a directory in Hugging Face layout, a FILE.gguf, a hub id that is in "
                  "the local cache, or synthetic:NAME",
       .is_path = true},
      {"model.embeddings",
       QLAB_SLOT(model.embeddings),
       "where the input embeddings lie; host: a micro-batch brings its rows along, which saves the "
       "GPU the whole table where lm_head is not tied to it; auto: device, or host where "
       "recompute auto finds that faster",
       none,
       {"auto", "device", "host"}},
      {.key = "model.streamed_layers",
       .slot = QLAB_SLOT(model.streamed_layers),
       .meaning = "how many decoder layers keep their weights in page-locked host memory, from "
                  "where they come in every pass, while the layer before is computed: a number, or "
                  "all; auto: 0, or as many as make recompute auto the fastest",
       .effect = none},
      {.key = "quant.type",
       .slot = QLAB_SLOT(quant.type),
       .meaning = "how the frozen linear layers are stored; of int8 only the bytes are known, for "
                  "qlab memory and inspect",
       .allowed = {"nf4", "bf16", "fp16", "fp32", "int8"},
       .unsupported = "fp4 and other types"},
      {"quant.block_size",
       QLAB_SLOT(quant.block_size),
       "values that share one NF4 scale",
       numbers,
       {"32", "64", "128", "256", "512", "1024", "2048", "4096"}},
      {"quant.double_quant", QLAB_SLOT(quant.double_quant),
       "store the NF4 scales themselves in 8 bits"},
      {"quant.compute_dtype",
       QLAB_SLOT(quant.compute_dtype),
       "type of activations and products; auto is bf16 on cuda, fp16 on a GPU without bf16, and "
       "fp32 on cpu",
       numbers,
       {"auto", "bf16", "fp16", "fp32"}},
      {.key = "quant.resident",
       .slot = QLAB_SLOT(quant.resident),
       .meaning =
           "GPU memory for weights kept expanded to the compute dtype, for example 14.3GB, at "
           "most what a step leaves free; auto: all of that",
       .effect = none},
      {.key = "lora.r",
       .slot = QLAB_SLOT(lora.r),
       .meaning = "rank of the adapters",
       .range = {.low = 1, .high = 2147483647}},
      {.key = "lora.alpha",
       .slot = QLAB_SLOT(lora.alpha),
       .meaning = "numerator of the adapters' scale",
       .range = above(0),
       .default_text = "2 r"},
      {.key = "lora.dropout",
       .slot = QLAB_SLOT(lora.dropout),
       .meaning = "probability with which an input of an adapter is dropped in training",
       .range = kFraction},
      {"lora.targets", QLAB_SLOT(lora.targets),
       "modules that get an adapter: attention, mlp, all-linear, qk, qv, a list of module names, "
       "or a regular expression without back-references that matches the whole module name"},
      {"lora.scaling",
       QLAB_SLOT(lora.scaling),
       "scale of the adapters' output",
       numbers,
       {"alpha/r", "alpha/sqrt(r)"}},
      {"lora.dtype",
       QLAB_SLOT(lora.dtype),
       "type of the adapter weights",
       numbers,
       {"fp32", "bf16"}},
      {.key = "lora.adapter",
       .slot = QLAB_SLOT(lora.adapter),
       .meaning = "start from this PEFT adapter directory",
       .is_path = true},
      {.key = "data.train",
       .slot = QLAB_SLOT(data.train),
       .meaning = "training examples: a JSONL file, or synthetic",
       .is_path = true},
      {.key = "data.eval",
       .slot = QLAB_SLOT(data.eval),
       .meaning =
           "evaluation examples: a JSONL file, or synthetic; without it nothing is evaluated",
       .is_path = true},
      {.key = "data.seq_len",
       .slot = QLAB_SLOT(data.seq_len),
       .meaning = "training examples are cut after this many tokens",
       .range = at_least(2)},
      {.key = "data.eval_seq_len",
       .slot = QLAB_SLOT(data.eval_seq_len),
       .meaning = "evaluation examples are cut after this many tokens; does not follow seq_len",
       .range = at_least(2)},
      {"data.completion_only", QLAB_SLOT(data.completion_only),
       "train on the completion's tokens alone"},
      {"data.shuffle", QLAB_SLOT(data.shuffle), "shuffle the examples anew in every epoch"},
      {"data.template",
       QLAB_SLOT(data.chat_template),
       "how messages become text",
       numbers,
       {"chatml"}},
      {.key = "train.steps",
       .slot = QLAB_SLOT(train.steps),
       .meaning = "optimizer steps; in place of train.epochs",
       .range = {.low = 1, .high = 1e9}},
      {.key = "train.epochs",
       .slot = QLAB_SLOT(train.epochs),
       .meaning = "passes over the training examples; in place of train.steps",
       .range = {.low = 0, .high = 1e6, .low_open = true},
       .default_text = "1"},
      {.key = "train.batch_size",
       .slot = QLAB_SLOT(train.batch_size),
       .meaning = "examples per micro-batch",
       .range = {.low = 1, .high = 65536}},
      {.key = "train.grad_accum",
       .slot = QLAB_SLOT(train.grad_accum),
       .meaning = "micro-batches per optimizer step",
       .range = {.low = 1, .high = 65536}},
      {.key = "train.seed",
       .slot = QLAB_SLOT(train.seed),
       .meaning = "seed of everything random; a sweep's seeds set it",
       .range = at_least(0)},
      {.key = "train.init_seed",
       .slot = QLAB_SLOT(train.init_seed),
       .meaning = "seed of the adapters' initial values",
       .range = at_least(0),
       .default_text = "train.seed"},
      {.key = "train.data_seed",
       .slot = QLAB_SLOT(train.data_seed),
       .meaning = "seed of the order of examples",
       .range = at_least(0),
       .default_text = "train.seed"},
      {.key = "train.dropout_seed",
       .slot = QLAB_SLOT(train.dropout_seed),
       .meaning = "seed of the dropout masks",
       .range = at_least(0),
       .default_text = "train.seed"},
      {"train.recompute",
       QLAB_SLOT(train.recompute),
       "what the backward pass computes again: selective, the outputs of norms and SwiGLU; full, "
       "all but each layer's input and its adapters' narrow products A x; offload, all but the "
       "inputs, which wait in host memory; auto, for each layer what is fastest within "
       "train.memory_budget",
       none,
       {"none", "selective", "full", "offload", "auto"}},
      {.key = "train.memory_budget",
       .slot = QLAB_SLOT(train.memory_budget),
       .meaning = "with recompute auto or a paged optimizer, what the run may take of the device "
                  "in all, for example 24GiB; auto: what is free, on a GPU less 1 GiB or an eighth",
       .effect = none},
      {.key = "train.graphs",
       .slot = QLAB_SLOT(train.graphs),
       .meaning = "record the steps of a shape that occurs again as a CUDA graph",
       .effect = none},
      {"train.loss_norm",
       QLAB_SLOT(train.loss_norm),
       "divide the loss by the trained tokens of the whole step, or average the means of its "
       "micro-batches",
       numbers,
       {"tokens", "microbatch"}},
      {.key = "train.eval_every",
       .slot = QLAB_SLOT(train.eval_every),
       .meaning = "steps between evaluations; 0: only before the first step and at the end",
       .effect = none,
       .range = at_least(0)},
      {.key = "train.log_every",
       .slot = QLAB_SLOT(train.log_every),
       .meaning = "steps between lines of metrics.jsonl",
       .effect = none,
       .range = at_least(1)},
      {.key = "train.save_every",
       .slot = QLAB_SLOT(train.save_every),
       .meaning = "steps between saved states; 0: only at the end and when interrupted",
       .effect = none,
       .range = at_least(0)},
      {.key = "optim.type",
       .slot = QLAB_SLOT(optim.type),
       .meaning = "AdamW with its states in 32 bits, or in 8 as bitsandbytes has them; paged_: "
                  "states wait in host memory while the device has no room for them, with the same "
                  "numbers and the same identity",
       .allowed = {"adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"},
       .unsupported = "other optimizers",
       .words = kOptimizers},
      {.key = "optim.lr",
       .slot = QLAB_SLOT(optim.lr),
       .meaning = "peak learning rate",
       .range = above(0)},
      {.key = "optim.betas",
       .slot = QLAB_SLOT(optim.betas),
       .meaning = "AdamW's decay rates of the two moments",
       .range = kFraction},
      {.key = "optim.beta1",
       .slot = QLAB_SLOT(optim.betas[0]),
       .meaning = "first of `optim.betas`",
       .range = kFraction,
       .hidden = true},
      {.key = "optim.beta2",
       .slot = QLAB_SLOT(optim.betas[1]),
       .meaning = "second of `optim.betas`",
       .range = kFraction,
       .hidden = true},
      {.key = "optim.eps",
       .slot = QLAB_SLOT(optim.eps),
       .meaning = "added to AdamW's denominator",
       .range = above(0)},
      {.key = "optim.weight_decay",
       .slot = QLAB_SLOT(optim.weight_decay),
       .meaning = "decoupled weight decay of the adapters",
       .range = at_least(0)},
      {.key = "optim.max_grad_norm",
       .slot = QLAB_SLOT(optim.max_grad_norm),
       .meaning = "gradients are scaled down to this norm; 0: never",
       .range = at_least(0)},
      {"optim.schedule",
       QLAB_SLOT(optim.schedule),
       "learning rate after the warmup",
       numbers,
       {"constant", "linear", "cosine"}},
      {.key = "optim.warmup_steps",
       .slot = QLAB_SLOT(optim.warmup_steps),
       .meaning = "steps over which the learning rate rises; in place of optim.warmup_ratio",
       .range = at_least(0)},
      {.key = "optim.warmup_ratio",
       .slot = QLAB_SLOT(optim.warmup_ratio),
       .meaning = "share of all steps over which the learning rate rises",
       .range = {.low = 0, .high = 1},
       .default_text = "0.03"},
      {.key = "parallel.trials_per_gpu",
       .slot = QLAB_SLOT(parallel.trials_per_gpu),
       .meaning = "trials of a sweep that train together on one base (a gang)",
       .effect = none,
       .range = at_least(1)},
  };
}

#undef QLAB_SLOT

std::vector<Alias> make_aliases() {
  const std::vector<std::pair<std::string, const char*>> recompute{{"true", "full"},
                                                                   {"false", "none"}};
  return {
      {"model_name_or_path", "model.path"},
      {"load_in_4bit", "quant.type", {{"true", "nf4"}, {"false", "bf16"}}},
      {"load_in_8bit", "quant.type", {{"true", "int8"}, {"false", nullptr}}},
      {"bnb_4bit_quant_type", "quant.type"},
      {"bnb_4bit_use_double_quant", "quant.double_quant"},
      {"bnb_4bit_compute_dtype", "quant.compute_dtype"},
      {"r", "lora.r"},
      {"lora_r", "lora.r"},
      {"alpha", "lora.alpha"},
      {"lora_alpha", "lora.alpha"},
      {"lora_dropout", "lora.dropout"},
      {"target_modules", "lora.targets"},
      {"use_rslora", "lora.scaling", {{"true", "alpha/sqrt(r)"}, {"false", "alpha/r"}}},
      {"dataset", "data.train"},
      {"train_file", "data.train"},
      {"validation_file", "data.eval"},
      {"max_length", "data.seq_len"},
      {"max_seq_length", "data.seq_len"},
      {"completion_only_loss", "data.completion_only"},
      {"max_steps", "train.steps", {{"-1", nullptr}}},
      {"num_train_epochs", "train.epochs"},
      {"per_device_train_batch_size", "train.batch_size"},
      {"gradient_accumulation_steps", "train.grad_accum"},
      {"gradient_checkpointing", "train.recompute", recompute},
      {"seed", "train.seed"},
      {"data_seed", "train.data_seed"},
      {"eval_steps", "train.eval_every"},
      {"logging_steps", "train.log_every"},
      {"save_steps", "train.save_every"},
      {"optim", "optim.type", kOptimizers},
      {"learning_rate", "optim.lr"},
      {"adam_beta1", "optim.beta1"},
      {"adam_beta2", "optim.beta2"},
      {"adam_epsilon", "optim.eps"},
      {"weight_decay", "optim.weight_decay"},
      {"max_grad_norm", "optim.max_grad_norm"},
      {"lr_scheduler_type", "optim.schedule", {{"constant_with_warmup", "constant"}}},
      {"warmup_steps", "optim.warmup_steps"},
      {"warmup_ratio", "optim.warmup_ratio"},
  };
}

/// Insertions, deletions, substitutions and swaps of neighbours.
int edit_distance(const std::string& a, const std::string& b) {
  const size_t n = a.size(), m = b.size();
  std::vector<std::vector<int>> d(n + 1, std::vector<int>(m + 1));
  for (size_t i = 0; i <= n; ++i) {
    for (size_t j = 0; j <= m; ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = static_cast<int>(i + j);
        continue;
      }
      const int substituted = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, substituted});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[n][m];
}

std::string leaf(const std::string& key) { return key.substr(key.rfind('.') + 1); }

/// What other tools call a key, where nearest() would find none or a wrong one and the values are
/// not always ours.
std::optional<std::string> known_elsewhere(const std::string& name) {
  static const std::map<std::string, std::string> keys{
      {"base_model", "model.path"},
      {"model_id", "model.path"},
      {"model_name", "model.path"},
      {"bits", "quant.type"},
      {"quantization", "quant.type"},
      {"quantization_config", "quant"},
      {"dtype", "quant.compute_dtype"},
      {"torch_dtype", "quant.compute_dtype"},
      {"lora_model_dir", "lora.adapter"},
      {"lora_rank", "lora.r"},
      {"lora_target_linear", "lora.targets"},
      {"rank", "lora.r"},
      {"rslora", "lora.scaling"},
      {"dataset_name", "data.train"},
      {"dataset_path", "data.train"},
      {"train_data", "data.train"},
      {"eval_data", "data.eval"},
      {"eval_dataset", "data.eval"},
      {"test_datasets", "data.eval"},
      {"test_file", "data.eval"},
      {"val_set_size", "data.eval"},
      {"cutoff_len", "data.seq_len"},
      {"model_max_length", "data.seq_len"},
      {"sequence_len", "data.seq_len"},
      {"assistant_only_loss", "data.completion_only"},
      {"train_on_inputs", "data.completion_only"},
      {"train_on_responses_only", "data.completion_only"},
      {"max_iters", "train.steps"},
      {"num_steps", "train.steps"},
      {"n_epochs", "train.epochs"},
      {"num_epochs", "train.epochs"},
      {"micro_batch_size", "train.batch_size"},
      {"random_state", "train.seed"},
      {"eval_strategy", "train.eval_every"},
      {"evals_per_epoch", "train.eval_every"},
      {"evaluation_strategy", "train.eval_every"},
      {"save_strategy", "train.save_every"},
      {"saves_per_epoch", "train.save_every"},
      {"optimizer", "optim.type"},
      {"beta1", "optim.betas"},
      {"beta2", "optim.betas"},
      {"grad_clip", "optim.max_grad_norm"},
      {"gradient_clipping", "optim.max_grad_norm"},
      {"lr_scheduler", "optim.schedule"},
      {"scheduler", "optim.schedule"},
      {"warmup", "optim.warmup_steps"},
      {"output_dir", "--out"},
  };
  const auto found = keys.find(leaf(name));
  return found == keys.end() ? std::nullopt : std::optional(found->second);
}

struct ToText {
  std::string operator()(const std::string* s) const { return *s; }
  std::string operator()(const int64_t* n) const { return std::to_string(*n); }
  std::string operator()(const double* x) const { return shortest(*x); }
  std::string operator()(const bool* b) const { return *b ? "true" : "false"; }
  template <class T>
  std::string operator()(const std::optional<T>* value) const {
    return *value ? (*this)(&**value) : "";
  }
  std::string operator()(const std::array<double, 2>* pair) const {
    return fmt::format("[{}, {}]", shortest((*pair)[0]), shortest((*pair)[1]));
  }
  std::string operator()(const Targets* targets) const { return targets->str(); }
  std::string operator()(const MemoryBudget* budget) const { return budget->text; }
  std::string operator()(const LayerCount* count) const { return count->text; }
};

}  // namespace

bool Range::contains(double x) const {
  return (low_open ? x > low : x >= low) && (high_open ? x < high : x <= high);
}

std::string Range::str() const {
  if (std::isinf(high)) {
    return std::isinf(low) ? "" : (low_open ? "above " : "at least ") + shortest(low);
  }
  return fmt::format("in {}{}, {}{}", low_open ? "(" : "[", shortest(low), shortest(high),
                     high_open ? ")" : "]");
}

const std::vector<Field>& config_fields() {
  static const std::vector<Field> fields = make_fields();
  return fields;
}

const std::vector<Alias>& config_aliases() {
  static const std::vector<Alias> aliases = make_aliases();
  return aliases;
}

const std::vector<std::string>& config_blocks() {
  static const std::vector<std::string> blocks{"model", "quant", "lora",    "data",
                                               "train", "optim", "parallel"};
  return blocks;
}

const std::vector<std::string>& sweep_keys() {
  static const std::vector<std::string> keys{"base",       "method", "metric",  "seeds",
                                             "parameters", "paired", "derived", "exclude",
                                             "include",    "run_cap"};
  return keys;
}

const Field* find_field(const std::string& key) {
  for (const Field& field : config_fields()) {
    if (field.key == key) return &field;
  }
  return nullptr;
}

const Alias* find_alias(const std::string& name) {
  for (const Alias& alias : config_aliases()) {
    const std::string home = alias.key.substr(0, alias.key.find('.') + 1);
    if (name == alias.name || name == home + alias.name) return &alias;
  }
  return nullptr;
}

std::vector<std::string> excluded_by(const std::string& key) {
  static const std::vector<std::pair<std::string, std::string>> exclusive{
      {"train.steps", "train.epochs"},
      {"optim.warmup_steps", "optim.warmup_ratio"},
      {"optim.betas", "optim.beta1"},
      {"optim.betas", "optim.beta2"}};
  std::vector<std::string> keys;
  for (const auto& [a, b] : exclusive) {
    if (key == a) keys.push_back(b);
    if (key == b) keys.push_back(a);
  }
  return keys;
}

std::string field_text(const Field& field, const Config& config) {
  return std::visit(ToText{}, field.slot(const_cast<Config&>(config)));
}

std::string nearest(const std::string& name, const std::vector<std::string>& names) {
  std::string best;
  int best_distance = 1 + std::max(1, static_cast<int>(leaf(name).size()) / 3);
  for (const std::string& candidate : names) {
    const bool same_leaf = leaf(candidate) == leaf(name);
    const int distance = same_leaf ? 0 : edit_distance(candidate, name);
    if (distance < best_distance) best = candidate, best_distance = distance;
  }
  return best;
}

std::string suggest_key(const std::string& name) {
  const std::string block = name.substr(0, name.find('.'));
  std::vector<std::string> candidates, in_block;
  for (const Field& field : config_fields()) {
    if (field.hidden) continue;
    candidates.push_back(field.key);
    if (field.key.starts_with(block + ".")) in_block.push_back(leaf(field.key));
  }
  for (const std::string& b : config_blocks()) candidates.push_back(b);
  for (const Alias& alias : config_aliases()) {
    candidates.push_back(alias.name);
    const std::string home = alias.key.substr(0, alias.key.find('.'));
    if (home == block && home != alias.name) candidates.push_back(home + "." + alias.name);
  }
  const std::optional<std::string> known = known_elsewhere(name);
  const std::string best = known ? *known : nearest(name, candidates);
  std::string text = best.empty() ? "" : fmt::format("; did you mean \"{}\"?", best);
  if (!in_block.empty()) {
    text += fmt::format(" (keys of {}: {})", block, fmt::join(in_block, ", "));
  } else if (best.empty()) {
    text += fmt::format(" (blocks: {})", fmt::join(config_blocks(), ", "));
  }
  return text;
}

std::string only_way(const std::string& name) {
  static const std::map<std::string, std::string> keys{
      {"bf16", "quant.compute_dtype is bf16 where the device computes in it"},
      {"bias", "biases are not trained, as with 'none'"},
      {"dataloader_num_workers", "data are read before the first step"},
      {"fan_in_fan_out", "weights are [out, in], as with false"},
      {"group_by_length", "examples come in random order, as with false"},
      {"inference_mode", "an adapter is trained, as with false"},
      {"logging_steps", "every step is logged"},
      {"modules_to_save", "adapters alone are trained, as with null"},
      {"per_device_eval_batch_size", "evaluation takes batches as training does"},
      {"remove_unused_columns", "fields without a use are not read"},
      {"report_to", "everything is in the results directory"},
      {"task_type", "models are causal language models, as with CAUSAL_LM"},
      {"trust_remote_code", "no code of a model is run"},
      {"use_dora", "adapters are LoRA's, as with false"},
  };
  const auto found = keys.find(leaf(name));
  return found == keys.end() ? "" : found->second;
}

std::string shortest(double x) {
  if (x == 0) return "0";  // -0 too
  return x == std::trunc(x) && std::abs(x) < 1e15 ? fmt::format("{:.0f}", x) : fmt::format("{}", x);
}

}  // namespace qlab
