// A sweep file: a base run and what varies (the words of W&B sweeps, docs/configuration.md),
// expanded into a list of trials in a fixed order: last parameter faster, seeds fastest.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "experiments/config.h"

namespace qlab {

struct Trial {
  Config config;                                           // resolved
  std::vector<std::pair<std::string, std::string>> swept;  // key and value, as Sweep::swept_keys
  int64_t seed = 0;
  std::string variant;  // swept values that do not change the numbers, for example recompute
  std::string name;     // short, safe as a file name, unique in the sweep: r8-attention-lr2e-4-s0
};

struct Sweep {
  std::string name;
  std::string method = "grid";       // grid | random
  std::string metric = "eval_loss";  // a column of the summary
  std::string goal = "minimize";     // minimize | maximize
  std::vector<int64_t> seeds;
  std::vector<std::string> swept_keys;
  std::vector<std::string> derived_keys;  // of these, those that follow others in every trial
  std::vector<Trial> trials;              // never empty
  std::string source_file;
  bool single = false;  // one run of a plain file, which joins those before it in its directory
  std::vector<std::string> notes;  // ignored W&B keys, dropped duplicates: to be printed
};

/// Reads a sweep file, or a plain config file as a sweep of one trial. `sets` apply to the base and
/// fix a swept key of the same name.
Sweep load_sweep(const std::string& file, const std::vector<std::string>& sets);

/// Text that changes when the bytes of a file (or all files of a model) do; "" when there is none,
/// and then the path itself enters the hash.
struct Fingerprints {
  std::string model, train, eval, adapter;
};
/// Changes when the program's numbers do, so that older results are not taken for finished ones.
inline constexpr int numerics_version = 5;
/// 16 hex digits over everything that changes a trial's numbers. `compute_dtype` is what "auto"
/// became on the device.
std::string trial_hash(const Trial& trial, const Fingerprints& fingerprints,
                       const std::string& compute_dtype);
/// `<hash>-<name>`, or the directory under `trials_dir` that already begins with the hash, or, made
/// by an earlier version, with its first 8 digits and has the trial's settings in config.yaml.
std::string trial_directory(const std::string& trials_dir, const std::string& hash,
                            const Trial& trial);
/// Indices of the trials of shard "I/N", 1-based: those with index % N == I - 1.
std::vector<int> shard(const std::string& text, int trials);

/// One line per trial with its swept values, and further columns that begin with their heads.
std::string trial_table(const Sweep& sweep,
                        const std::vector<std::vector<std::string>>& columns = {});

}  // namespace qlab
