// One run, as plain structs. A YAML file and --set options are read strictly against one table of
// fields (config_fields.cpp), from which defaults, aliases, documentation, config.yaml and the
// identity of a trial also come.
#pragma once
#include <yaml-cpp/yaml.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace qlab {

/// "0", "40", "all", or "auto".
struct LayerCount {
  std::string text;
  bool operator==(const LayerCount&) const = default;
};

struct ModelConfig {
  std::string path;                    // directory, FILE.gguf, hub id, or synthetic:NAME
  std::string embeddings = "auto";     // auto | device | host
  LayerCount streamed_layers{"auto"};  // number | all | auto
};

/// Of bytes without a unit that are too few to be meant, "did you mean 24GiB?"; otherwise "".
std::string missing_unit(const std::string& text);

/// "14.3GB", "24GiB", a number of bytes ("0" is the only spelling of none), or "auto".
struct MemoryBudget {
  std::string text;
  bool operator==(const MemoryBudget&) const = default;
};

struct QuantConfig {
  std::string type = "nf4";  // nf4 | bf16 | fp16 | fp32 | int8 (bytes alone)
  int64_t block_size = 64;
  bool double_quant = true;
  std::string compute_dtype = "auto";  // auto | bf16 | fp16 | fp32
  MemoryBudget resident{"0"};          // bytes | auto
};

/// Which modules get an adapter: a keyword or a regex over the whole name, or a list of names.
struct Targets {
  std::string pattern =
      "all-linear";  // attention | mlp | all-linear | qk | qv | regex; "" with names
  std::vector<std::string> names;
  std::string str() const;  // "all-linear", "[q_proj, v_proj]"
  bool operator==(const Targets&) const = default;
};

struct LoraConfig {
  bool present = false;  // the file has a lora block, or some lora key was set
  int64_t r = 16;
  std::optional<double> alpha;  // resolve() fills in 2 r
  double dropout = 0;
  Targets targets;
  std::string scaling = "alpha/r";  // alpha/r | alpha/sqrt(r)
  std::string dtype = "fp32";       // fp32 | bf16
  std::string adapter;              // PEFT directory to start from; "" for a fresh adapter
  double scale() const;             // after resolve()
};

struct DataConfig {
  std::string train, eval;  // file.jsonl or "synthetic"; eval "" means no evaluation
  int64_t seq_len = 512;
  int64_t eval_seq_len = 512;  // never follows seq_len
  bool completion_only = true;
  bool shuffle = true;
  std::string chat_template = "chatml";  // key data.template
};

struct TrainConfig {
  std::optional<int64_t> steps;  // after resolve() exactly one of steps and epochs is set
  std::optional<double> epochs;  // 1 when neither is given
  int64_t batch_size = 4;        // examples per micro-batch
  int64_t grad_accum = 1;        // micro-batches per optimizer step
  int64_t seed = 0;
  std::optional<int64_t> init_seed, data_seed, dropout_seed;  // resolve() fills in seed
  std::string recompute = "none";      // none | selective | full | offload | auto
  MemoryBudget memory_budget{"auto"};  // bytes | auto
  bool graphs = true;
  std::string loss_norm = "tokens";  // tokens | microbatch
  int64_t eval_every = 0;            // steps; 0: only before the first step and at the end
  int64_t log_every = 1;
  int64_t save_every = 100;  // steps; 0: only at the end and on interruption
};

struct OptimConfig {
  std::string type = "adamw";  // adamw | adamw8bit | paged_adamw | paged_adamw8bit
  double lr = 2e-4;
  std::array<double, 2> betas{0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 0;
  double max_grad_norm = 1.0;           // 0: no clipping
  std::string schedule = "cosine";      // constant | linear | cosine
  std::optional<int64_t> warmup_steps;  // after resolve() exactly one of the two is set
  std::optional<double> warmup_ratio;   // 0.03 when neither is given
};

struct ParallelConfig {
  int64_t trials_per_gpu = 1;  // the size of a gang
};

struct Config {
  ModelConfig model;
  QuantConfig quant;
  LoraConfig lora;
  DataConfig data;
  TrainConfig train;
  OptimConfig optim;
  ParallelConfig parallel;
  std::map<std::string, std::string> origins;  // of given keys: file:line, or the option
};

/// Reads `file` ("" for the defaults alone), applies `sets` ("key=value") and resolves.
Config load_config(const std::string& file, const std::vector<std::string>& sets);

/// The defaults overridden by a document, not yet resolved. `file` is named in errors, and paths
/// that do not exist from the current directory are looked up beside it.
Config parse_config(const YAML::Node& document, const std::string& file);
/// Sets one key (dotted or alias; a block name with a map sets several), as --set does. A later
/// setting of train.steps replaces train.epochs, and so on. `origin` begins every error.
void set_key(Config& config, const std::string& key, const YAML::Node& value,
             const std::string& origin);
/// One key given one value, and where `file` says so.
struct Setting {
  std::string key;
  YAML::Node value;
  std::string where;
};
/// Sets keys together, as one block of `file` would: two that contradict each other are an error.
void set_keys(Config& config, const std::vector<Setting>& settings, const std::string& file);
/// Applies "key=value" options together; giving a key twice is an error.
void apply_sets(Config& config, const std::vector<std::string>& sets);
/// Fills in what depends on other keys (alpha, seeds, steps or epochs, warmup) and checks it.
void resolve(Config& config);
/// Throws unless the config says what to train: a model, data, and a lora block.
void check_trainable(const Config& config, const std::string& origin);
/// "" or, where the weights' format is known by its bytes alone, that.
std::string why_not_computable(const Config& config);
/// Throws there.
void check_computable(const Config& config, const std::string& origin);

/// config.yaml: every key, resolved; parse_config() and resolve() give back an equal config.
std::string to_yaml(const Config& config);
/// One line per key that changes the numbers, with numbers in their shortest form (2e-4 is 0.0002)
/// and without keys that have no effect; equal texts mean equal runs.
std::string canonical(const Config& config);
/// The value of a key as text; "" when it has none.
std::string get_key(const Config& config, const std::string& key);
/// The same for a value as --set would give it; `origin` begins errors.
std::string value_text(const std::string& key, const std::string& value, const std::string& origin);

/// The dotted key an alias or a dotted key stands for; Error with the nearest key when unknown.
std::string canonical_key(const std::string& key, const std::string& origin);
/// True when the key enters canonical().
bool changes_numbers(const std::string& key);
/// Every key with its default and meaning: for the terminal, and as Markdown for the documentation.
std::string config_table();
std::string config_markdown();

}  // namespace qlab
