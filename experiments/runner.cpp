#include "experiments/runner.h"

#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "data/checkpoint.h"
#include "data/file.h"
#include "experiments/forecast.h"
#include "experiments/gangs.h"
#include "experiments/planner.h"
#include "experiments/remedy.h"
#include "experiments/report.h"
#include "generated/version.h"
#include "nn/adapter_file.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

struct Planned {
  const Trial* trial;
  std::string dir;  // trials/<hash>-<name>
  bool finished = false;
};

std::string adapter_fingerprint(const std::string& dir) {
  if (dir.empty()) return "";
  return file_fingerprint(dir + "/adapter_model.safetensors") +
         file_fingerprint(dir + "/adapter_config.json");
}

std::vector<Adapter::Shape> adapted_shapes(const LlamaConfig& config, const LoraSpec& spec) {
  const std::vector<Adapter::Shape> all = linear_shapes(config);
  std::vector<std::string> names;
  for (const Adapter::Shape& s : all) names.push_back(s.name);
  std::vector<Adapter::Shape> adapted;
  for (const int i : resolve_targets(spec, names)) adapted.push_back(all[i]);
  return adapted;
}

/// An error of `body` is told with the place where the key was set; `named` when it names the key.
template <class Body>
auto at_key(const Config& config, const std::string& key, Body&& body, bool named = false) {
  try {
    return body();
  } catch (const OutOfMemory&) {
    throw;
  } catch (const Error& error) {
    const auto origin = config.origins.find(key);
    fail("{}{}{}", origin == config.origins.end() ? "" : origin->second + ": ",
         named ? "" : key + ": ", error.what());
  }
}

void check_exists(const Config& config, const char* key) {
  const std::string path = get_key(config, key);
  if (path.empty() || path == "synthetic" || std::filesystem::exists(path)) return;
  at_key(config, key, [&] { fail("there is no file {}", path); });
}

void check_positions(const Config& c, int64_t positions) {
  const auto check = [&](const char* key, int64_t seq_len) {
    if (seq_len <= positions) return;
    at_key(c, key,
           [&] { fail("{} exceeds the {} positions of {}", seq_len, positions, c.model.path); });
  };
  check("data.seq_len", c.data.seq_len);
  if (!c.data.eval.empty()) check("data.eval_seq_len", c.data.eval_seq_len);
}

void check_start(const Config& c, const std::vector<Adapter::Shape>& targets) {
  const std::string& dir = c.lora.adapter;
  if (dir.empty()) return;
  at_key(c, "lora.adapter", [&] {
    const LoraSpec saved = read_adapter_spec(dir);
    try {
      check_adapter(dir, lora_spec(c), targets);
    } catch (const Error& error) {
      fail("{}\n  the adapter has lora.targets: {}", error.what(),
           Targets{saved.pattern, saved.names}.str());
    }
  });
}

// Opens every file and resolves every target, so that mistakes surface before the first step.
std::vector<Planned> plan_trials(const Sweep& sweep, const std::string& dir, Device device,
                                 Library& library) {
  std::vector<Planned> planned;
  for (const Trial& trial : sweep.trials) {
    const Config& c = trial.config;
    check_trainable(c, sweep.source_file);
    for (const char* key : {"data.train", "data.eval"}) check_exists(c, key);
    const ModelSource& model =
        *at_key(c, "model.path", [&] { return &library.model(c.model.path); });
    check_positions(c, most_positions(c.model.path, model.config));
    const std::vector<Adapter::Shape> targets = at_key(
        c, "lora.targets", [&] { return adapted_shapes(model.config, lora_spec(c)); }, true);
    check_start(c, targets);
    const Fingerprints prints{library.fingerprint(c.model.path), library.train_set(c).fingerprint,
                              c.data.eval.empty() ? "" : library.eval_set(c).fingerprint,
                              adapter_fingerprint(c.lora.adapter)};
    const DType compute = at_key(
        c, "quant.compute_dtype", [&] { return compute_dtype(c, device); }, true);
    const std::string hash = trial_hash(trial, prints, name_of(compute));
    Planned p{&trial, dir + "/trials/" + trial_directory(dir + "/trials", hash, trial)};
    p.finished = TrialFiles::read_status(p.dir) == "finished";
    planned.push_back(p);
  }
  return planned;
}

void report_data(const Sweep& sweep, Library& library,
                 const std::function<void(const std::string&)>& print) {
  std::vector<const Dataset*> seen;
  const auto report = [&](const Dataset& data, const std::string& path, int64_t seq_len) {
    if (std::find(seen.begin(), seen.end(), &data) != seen.end()) return;
    seen.push_back(&data);
    print(
        fmt::format("data   {}: {} examples, {} tokens, {} trained; {} cut at {} tokens, {} "
                    "dropped (nothing trained left)",
                    path, data.examples.size(), data.tokens, data.trained_tokens, data.truncated,
                    seq_len, data.dropped));
  };
  for (const Trial& trial : sweep.trials) {
    const DataConfig& d = trial.config.data;
    report(library.train_set(trial.config), d.train, d.seq_len);
    if (!d.eval.empty()) report(library.eval_set(trial.config), d.eval, d.eval_seq_len);
  }
}

/// Of all that a run reads. Each replica reads for itself.
std::string contents(Library& library, const Config& c) {
  return fmt::format("{} {} {} {}", library.fingerprint(c.model.path),
                     library.train_set(c).fingerprint,
                     c.data.eval.empty() ? "" : library.eval_set(c).fingerprint,
                     adapter_fingerprint(c.lora.adapter));
}

/// Every value of a key, in the order of the trials.
std::string values_of(const Sweep& sweep, const char* key) {
  std::vector<std::string> values;
  for (const Trial& trial : sweep.trials) {
    const std::string value = get_key(trial.config, key);
    if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
  }
  return fmt::format("{}", fmt::join(values, ", "));
}

std::map<std::string, std::string> environment(const Sweep& sweep, Device device) {
  const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S %z", std::localtime(&now));
  return {{"version", std::string(version)},
          {"commit", std::string(git_commit)},
          {"date", date},
          {"device", device_description(device)},
          {"cuda", cuda::build_version().empty() ? "none" : cuda::build_version()},
          {"model", values_of(sweep, "model.path")},
          {"data", values_of(sweep, "data.train")}};
}

// Found before anything is read, and without making a folder that a mistake would leave behind.
void check_results_directory(const std::string& dir) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path there = fs::absolute(dir);
  while (!fs::exists(there, error) && there.has_relative_path()) there = there.parent_path();
  if (!fs::is_directory(there, error))
    fail("{}: cannot be created: {} is not a directory; give --out another one", dir,
         there.string());
  if (access(there.c_str(), W_OK | X_OK) != 0)
    fail("{}: {} cannot be written to: {}; give --out another directory", dir, there.string(),
         std::strerror(errno));
}

// A dry run may well be on another machine than the model and the data.
void note_missing(const Sweep& sweep, const std::function<void(const std::string&)>& print) {
  std::set<std::string> notes;
  for (const Trial& trial : sweep.trials) {
    const Config& c = trial.config;
    try {
      for (const char* key : {"data.train", "data.eval", "lora.adapter"}) check_exists(c, key);
      if (!c.model.path.starts_with("synthetic:"))
        at_key(c, "model.path", [&] { return resolve_model_path(c.model.path); });
    } catch (const Error& error) {
      notes.insert(error.what());
    }
  }
  for (const std::string& note : notes) print("not here: " + note);
}

/// What the allocator hands out for as long as a gang with paged states trains.
class PagedLimit {
 public:
  PagedLimit(const Config& first, Device device, int64_t planned) : device_(device) {
    const std::optional<int64_t> capacity = target_here(device).capacity;
    if (is_paged(first) && capacity)
      before_ = limit_memory(device, std::max(*allocator_limit(first, device, capacity), planned));
  }
  ~PagedLimit() {
    if (before_) limit_memory(device_, *before_);
  }
  PagedLimit(const PagedLimit&) = delete;
  PagedLimit& operator=(const PagedLimit&) = delete;

 private:
  Device device_;
  std::optional<int64_t> before_;
};

class Runner {
 public:
  Runner(Library& library, Device device, bool force,
         const std::function<void(const std::string&)>& print, TrainCallbacks callbacks,
         RunnerResult& result, Replicas* replicas = nullptr)
      : library_(library),
        device_(device),
        force_(force),
        print_(print),
        callbacks_(std::move(callbacks)),
        result_(result),
        replicas_(replicas) {}

  /// Whatever goes wrong is these trials' own.
  void run(const std::vector<Planned>& planned) {
    std::vector<TrialFiles> files;
    const std::vector<Planned> gang = claim(planned, files);
    if (gang.empty()) return;
    try {
      if (const std::string why = why_in_halves(gang); !why.empty()) {
        files.clear();
        return run_halves(gang, why);
      }
      if (replicas_ != nullptr) {
        replicas_->tell(gang.front().dir);
        replicas_->tell(contents(library_, gang.front().trial->config));
      }
      train(gang, std::move(files));
    } catch (const Interrupted&) {
      result_.interrupted = true;
    } catch (const OutOfMemory& error) {
      give_up(gang, error.what(), "does not fit");
    } catch (const std::bad_alloc&) {
      give_up(gang, "out of memory on the host; set a smaller train.batch_size or data.seq_len",
              "does not fit");
    } catch (const std::exception& error) {
      library_.drop_base();  // left in the middle of a step
      loaded_.clear();
      give_up(gang, error.what(), fmt::format("failed: {}", error.what()));
    }
  }

  /// As another replica of the trial, whose directory is rank 0's. Throws whatever goes wrong.
  void assist(const Planned& planned) {
    const RunPlan plan = check_fits({planned});
    const PagedLimit limit(planned.trial->config, device_, plan.peak);
    Llama& model = load_as(plan, planned.trial->config);
    TrialRun run(planned.trial->config, planned.trial->name, TrialFiles::reading(planned.dir),
                 library_, model);
    Gang(library_, model, {&run}, callbacks_, force_, replicas_).run();
  }

  /// What another process was running when its turn came, as it is now.
  void count_elsewhere() {
    for (const Planned& p : elsewhere_)
      ++(TrialFiles::read_status(p.dir) == "finished" ? result_.finished : result_.elsewhere);
    if (result_.elsewhere > 0)
      print_(fmt::format(
          "{} skipped: another process is running {}; the same command continues what it leaves",
          result_.elsewhere == 1 ? "1 trial was" : fmt::format("{} trials were", result_.elsewhere),
          result_.elsewhere == 1 ? "it" : "them"));
  }

  /// Throws OutOfMemory before anything is loaded where minutes later the allocator would. Returns
  /// the plan.
  RunPlan check_fits(const std::vector<Planned>& gang) {
    MemoryTarget target = here();
    const std::vector<PaperTrial> papers = on_paper(gang);
    const Config& first = papers.front().config;
    const ModelSource& model = library_.model(first.model.path);
    const MemoryLimits limits{device_limit(first, device_, target.capacity), host_memory()};
    const RunPlan plan = plan_or_leanest(model, papers, device_, limits, target.rates);
    if (force_ || (plan.peak <= limits.budget && plan.host_peak <= limits.host)) return plan;
    if (gang.size() > 1) throw OutOfMemory("does not fit");  // its halves are tried
    std::vector<std::string> lacks;
    if (plan.peak > limits.budget) {
      const MemoryPrediction need = predict_memory(
          model, papers, device_, allocator_limit(first, device_, target.capacity), plan);
      lacks.push_back(fmt::format(
          "would take {}{}, and {} has {}", needed_text(need),
          first.train.recompute == "auto" ? ", by its leanest plan (" + describe(plan) + ")" : "",
          limits.budget < target.capacity ? "its budget" : target.name,
          format_bytes(limits.budget)));
    }
    if (plan.host_peak > limits.host)
      lacks.push_back(fmt::format("needs {} of host memory, of {}", format_minimum(plan.host_peak),
                                  format_bytes(limits.host)));
    target.host = limits.host;
    const auto remedy =
        cheapest_fit(model, papers, device_,
                     {target.capacity.value_or(MemoryLimits::none), limits.host}, target.rates);
    throw OutOfMemory(fmt::format(
        "does not fit: the run {}; {}; --force tries all the same", fmt::join(lacks, ", and "),
        way_out(remedy, target, limits.budget, plan.peak, plan.host_peak)));
  }

 private:
  int64_t replicas() const { return replicas_ != nullptr ? replicas_->size() : 1; }
  MemoryTarget here() const { return target_here(device_, replicas()); }

  /// Beside a GPU; a base that is loaded already has its part of it.
  int64_t host_memory() const {
    const std::optional<int64_t> host = here().host;
    return force_ || !host ? MemoryLimits::none : *host + library_.streamed_bytes();
  }

  std::vector<PaperTrial> on_paper(const std::vector<Planned>& gang) {
    std::vector<PaperTrial> papers;
    for (const Planned& p : gang)
      papers.push_back(paper_trial(p.trial->config, library_, device_, replicas()));
    return papers;
  }

  /// "" unless a gang is slower together.
  std::string why_in_halves(const std::vector<Planned>& gang) {
    if (gang.size() < 2 || force_) return "";
    const MemoryTarget target = here();
    const std::vector<PaperTrial> papers = on_paper(gang);
    const Config& first = papers.front().config;
    const ModelSource& model = library_.model(first.model.path);
    const MemoryLimits limits{device_limit(first, device_, target.capacity), host_memory()};
    const auto plan = fitting_plan(model, papers, device_, limits, target.rates);
    if (!plan) return "";
    const auto halves = faster_in_halves(
        papers, *plan, [&](std::span<const PaperTrial> half) -> std::optional<double> {
          const auto own = fitting_plan(model, half, device_, limits, target.rates);
          return own ? std::optional(own->step_seconds) : std::nullopt;
        });
    if (!halves) return "";
    return fmt::format("is predicted to take {} a step, its halves one after the other {}",
                       duration_text(plan->step_seconds), duration_text(*halves));
  }

  /// Those of the trials that are left to do, and their directories; other processes may share the
  /// sweep.
  std::vector<Planned> claim(const std::vector<Planned>& planned, std::vector<TrialFiles>& files) {
    std::vector<Planned> claimed;
    for (const Planned& p : planned) {
      try {
        TrialFiles own(p.dir);
        if (TrialFiles::read_status(p.dir) == "finished") {
          ++result_.finished;
          continue;
        }
        files.push_back(std::move(own));
        claimed.push_back(p);
      } catch (const Busy& error) {
        elsewhere_.push_back(p);
        print_(fmt::format("{}: skipped: {}", p.trial->name, error.what()));
      } catch (const Error& error) {
        ++result_.failed;
        print_(fmt::format("{}: failed: {}", p.trial->name, error.what()));
      }
    }
    return claimed;
  }

  void train(const std::vector<Planned>& gang, std::vector<TrialFiles> files) {
    const Config& first = gang.front().trial->config;
    const RunPlan plan = check_fits(gang);
    const PagedLimit limit(first, device_, plan.peak);
    Llama& model = load_as(plan, first);
    std::vector<std::unique_ptr<TrialRun>> runs;
    std::vector<TrialRun*> pointers;
    std::vector<std::pair<const Planned*, std::string>> damaged;
    for (size_t i = 0; i < gang.size(); ++i) {
      const Planned& p = gang[i];
      try {
        runs.push_back(std::make_unique<TrialRun>(p.trial->config, p.trial->name,
                                                  std::move(files[i]), library_, model));
        pointers.push_back(runs.back().get());
        if (const TrialRun& run = *runs.back(); run.step() > 0)
          print_(fmt::format("{}: continues at step {} of {}", run.name(), run.step(),
                             run.total_steps()));
      } catch (const OutOfMemory&) {
        throw;
      } catch (const Error& error) {  // for example a state that cannot be read
        damaged.emplace_back(&p, error.what());
      }
    }
    if (!runs.empty()) Gang(library_, model, pointers, callbacks_, force_, replicas_).run();
    for (const auto& [planned, error] : damaged) fail_trial(*planned, error);
    for (const auto& r : runs) {
      switch (r->state()) {
        case TrialRun::State::finished:
          ++result_.finished;
          break;
        case TrialRun::State::failed:
          ++result_.failed;
          print_(fmt::format("{}: failed: {}", r->name(), r->error()));
          break;
        default:
          result_.interrupted = true;
      }
    }
  }

  /// The error of a gang may be one trial's, or its size: its halves are tried.
  void give_up(const std::vector<Planned>& gang, const std::string& error, const std::string& why) {
    if (gang.size() == 1) return fail_trial(gang.front(), error);
    run_halves(gang, why);
  }

  void run_halves(const std::vector<Planned>& gang, const std::string& why) {
    print_(fmt::format("a gang of {} {}; trying halves", gang.size(), why));
    const auto middle = gang.begin() + static_cast<std::ptrdiff_t>(gang.size() / 2);
    run({gang.begin(), middle});
    if (!result_.interrupted) run({middle, gang.end()});
  }

  /// The base of `config`, placed as planned.
  Llama& load_as(const RunPlan& plan, Config config) {
    config.model.embeddings = plan.host_embeddings ? "host" : "device";
    config.model.streamed_layers.text = std::to_string(plan.streamed_layers);
    const DType compute = compute_dtype(config, device_);
    const std::string key = base_key(config, compute, device_);
    if (key != loaded_) {
      print_(fmt::format("model  {}: {} on {}{}", config.model.path, config.quant.type,
                         replicas() > 1 ? fmt::format("{} x ", replicas()) : "",
                         device_description(device_)));
      loaded_ = key;
    }
    return library_.base(config, compute, device_);
  }

  void fail_trial(const Planned& planned, const std::string& error) {
    ++result_.failed;
    print_(fmt::format("{}: failed: {}", planned.trial->name, error));
    try {
      TrialFiles files(planned.dir);
      files.log(error);
      files.write_status({{"status", "failed"}, {"error", error}});
    } catch (const Error& also) {  // a full disk, perhaps
      print_(fmt::format("{}: {}", planned.trial->name, also.what()));
    }
  }

  Library& library_;
  Device device_;
  bool force_;
  const std::function<void(const std::string&)>& print_;
  TrainCallbacks callbacks_;
  RunnerResult& result_;
  Replicas* replicas_;
  std::string loaded_;
  std::vector<Planned> elsewhere_;
};

}  // namespace

RunnerResult run_sweep(const Sweep& sweep, const RunnerOptions& options,
                       const std::function<void(const std::string&)>& print,
                       TrainCallbacks callbacks) {
  RunnerResult result;
  result.dir = options.out.empty() ? "runs/" + sweep.name : options.out;
  for (const std::string& note : sweep.notes) print(note);
  const std::vector<int> mine = options.shard.empty()
                                    ? std::vector<int>{}
                                    : shard(options.shard, static_cast<int>(sweep.trials.size()));
  if (!options.shard.empty() && mine.empty()) {
    print(fmt::format("shard {} holds none of the trials, of which there {} {}: nothing to train",
                      options.shard, sweep.trials.size() == 1 ? "is" : "are", sweep.trials.size()));
  }
  if (options.dry_run) {
    Sweep shown = sweep;
    if (!options.shard.empty()) {
      shown.trials.clear();
      for (const int i : mine) shown.trials.push_back(sweep.trials[static_cast<size_t>(i)]);
    }
    Library library(callbacks.stop, true);
    const MemoryTarget target = target_here(options.device, options.replicas);
    print(forecast_table(shown, forecast(shown, library, target), target));
    note_missing(shown, print);
    return result;
  }
  if (options.out.empty() &&
      (sweep.name.find('/') != std::string::npos || sweep.name.starts_with('.')))
    fail(
        "{}: the name {} cannot be a folder in runs/; use one without / and a leading dot, or "
        "--out",
        sweep.source_file, sweep.name);
  check_results_directory(result.dir);
  Library library(callbacks.stop);
  std::vector<Planned> planned = plan_trials(sweep, result.dir, options.device, library);
  report_data(sweep, library, print);
  std::vector<std::string> warnings;
  for (const Trial& t : sweep.trials) {
    const std::string text =
        requantization_warning(library.model(t.config.model.path), weight_spec(t.config));
    const bool swept = std::any_of(sweep.swept_keys.begin(), sweep.swept_keys.end(),
                                   [](const std::string& k) { return k.starts_with("quant."); });
    if (!text.empty() && swept &&
        std::find(warnings.begin(), warnings.end(), text) == warnings.end())
      warnings.push_back(text);
    const std::string budget = budget_without_effect(t.config);
    if (!budget.empty() && std::find(warnings.begin(), warnings.end(), budget) == warnings.end())
      warnings.push_back(budget);
  }
  for (const std::string& w : warnings) print("warning: " + w);

  Runner runner(library, options.device, options.force, print, callbacks, result, options.others);
  if (sweep.single && !planned.front().finished) runner.check_fits(planned);

  std::vector<std::string> directories;
  for (const Planned& p : planned)
    directories.push_back(std::filesystem::path(p.dir).filename().string());
  std::error_code error;
  std::filesystem::create_directories(result.dir + "/trials", error);
  if (error)
    fail("{}/trials: cannot be created: {}; give --out a directory that can be written to",
         result.dir, error.message());
  Sweep listed = sweep;
  {
    const auto lock = lock_results(result.dir);
    if (sweep.single) {
      add_earlier_trials(result.dir, listed, directories);
      planned.front().trial = &listed.trials.back();
      // By its directory the next run knows this one, which may take long to load.
      std::filesystem::create_directories(planned.front().dir, error);
    }
    write_plan(result.dir, listed, directories, environment(listed, options.device));
  }

  std::vector<Planned> pending;
  for (size_t i = 0; i < planned.size(); ++i) {
    if (!options.shard.empty() &&
        std::find(mine.begin(), mine.end(), static_cast<int>(i)) == mine.end())
      continue;
    if (planned[i].finished)
      ++result.finished;
    else
      pending.push_back(planned[i]);
  }
  if (result.finished > 0)
    print(fmt::format("{} finished already", result.finished == 1
                                                 ? "1 trial is"
                                                 : fmt::format("{} trials are", result.finished)));
  std::vector<const Config*> configs;
  for (const Planned& p : pending) configs.push_back(&p.trial->config);
  for (const std::vector<size_t>& indices : gangs_of(configs, options.device)) {
    if (result.interrupted) break;
    std::vector<Planned> gang;
    for (const size_t i : indices) gang.push_back(pending[i]);
    runner.run(gang);
  }
  runner.count_elsewhere();
  for (const std::string& note : write_report(result.dir).notes) print(note);
  return result;
}

void assist(Replicas& replicas, const Config& config, Device device, bool force) {
  Library library;
  library.train_set(config);
  if (!config.data.eval.empty()) library.eval_set(config);
  const Trial trial{.config = config, .swept = {}, .seed = 0, .variant = "", .name = "replica"};
  const Planned planned{&trial, replicas.tell("")};
  if (replicas.tell("") != contents(library, config))
    fail(
        "read another model, data or adapter than replica 0: a file was changed while the run "
        "started; run the same command again");
  RunnerResult none;
  const std::function<void(const std::string&)> silent = [](const std::string&) {};
  Runner(library, device, force, silent, {}, none, &replicas).assist(planned);
}

}  // namespace qlab
