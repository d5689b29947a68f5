// The subcommands of qlab. Each returns the exit code; errors are thrown and end with code 2.
#pragma once
#include <string>
#include <vector>

#include "experiments/generate.h"
#include "experiments/memory_results.h"

namespace qlab {

struct CommonOptions {
  std::string device = "auto";
  std::vector<std::string> sets;  // key=value
  std::string device_memory;      // bytes, "" for all that the device has
};

struct SweepOptions {
  std::string file, out, shard;
  bool dry_run = false, profile = false, force = false;
  int replicas = 1;
};
int run_sweep_command(const SweepOptions& options, const CommonOptions& common);
int run_train_command(const SweepOptions& options, const CommonOptions& common);
int run_report_command(const std::string& dir);
int run_config_command(const std::string& file, const CommonOptions& common);

int run_inspect_command(const std::string& model, const CommonOptions& common);

struct MemoryOptions {
  std::string target;       // FILE.yaml or a model; "" with a table
  std::string gpu;          // a name or bytes; "": the GPU here, or one without an end
  std::string host_memory;  // bytes beside it; "": as measured here, or without an end
  std::string check;        // a results directory or a trial's
  bool json = false;
  std::string table, format = "text", out;     // a published table; "" as the target has it
  std::string measured = memory_results_file;  // of a table's measured column
};
/// What a run would need, without running it; a published table beside ours; or what trials took
/// against what was predicted, 1 where one differs.
int run_memory_command(const MemoryOptions& options, const CommonOptions& common);

struct GenerateOptions {
  std::string model, adapter, prompt;
  bool chat = false;
  SamplingOptions sampling;
};
int run_generate_command(const GenerateOptions& options, const CommonOptions& common);

struct EvalOptions {
  std::string model, adapter, data;
  bool json = false;
};
int run_eval_command(const EvalOptions& options, const CommonOptions& common);

/// `file` "-" is the standard input.
int run_tokenize_command(const std::string& model, const std::string& file, bool jsonl);

}  // namespace qlab
