// qlab memory.
#include <fmt/ranges.h>

#include <algorithm>

#include "data/file.h"
#include "experiments/commands.h"
#include "experiments/forecast.h"
#include "experiments/memory_check.h"
#include "experiments/memory_tables.h"
#include "experiments/memory_text.h"
#include "experiments/terminal.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

bool is_yaml(const std::string& target) {
  return target.ends_with(".yaml") || target.ends_with(".yml");
}

/// `trials`: that train together.
int print_one(const Config& config, int64_t trials, Library& library, const MemoryOptions& options,
              const MemoryTarget& target) {
  const ModelSource& model = library.model(config.model.path);
  MemoryQuestion question{.model = config.model.path, .target = target};
  question.footprint =
      hf_footprint(model.config, weight_spec(config),
                   config.lora.present ? std::optional(lora_spec(config)) : std::nullopt);
  question.trials = config.lora.present ? static_cast<size_t>(trials) : 1;
  const std::vector<PaperTrial> gang(question.trials,
                                     trial_on_paper(config, library, target.device));
  question.tokens = usual_tokens(gang);
  question.assumed = assumptions(config, model);
  question.refused = why_not_computable(config);
  const int64_t capacity = target.capacity.value_or(MemoryLimits::none);
  const int64_t limit = device_limit(config, target.device, target.capacity);
  if (limit < capacity) question.budget = limit;
  const int64_t host = target.host.value_or(MemoryLimits::none);
  question.plan = plan_or_leanest(model, gang, target.device, {limit, host}, target.rates);
  const MemoryPrediction prediction =
      predict_memory(model, gang, target.device,
                     allocator_limit(config, target.device, target.capacity), question.plan);
  std::optional<Remedy> remedy;
  const bool fits = prediction.peak() <= limit && prediction.host_peak <= host;
  if (!fits && question.refused.empty())
    remedy = cheapest_fit(model, gang, target.device, {capacity, host}, target.rates);
  if (options.json)
    write_out(memory_json(question, prediction, remedy).dump() + "\n");
  else
    write_out(memory_text(question, config, prediction, remedy));
  return 0;
}

int print_table(const MemoryOptions& options, const CommonOptions& common) {
  const bool asks = !options.gpu.empty() || !options.host_memory.empty() || options.json ||
                    !common.sets.empty() || common.device != "auto" ||
                    !common.device_memory.empty();
  if (!options.target.empty() || asks)
    fail("--table {}: a table states its own models and settings; leave out {}", options.table,
         options.target.empty()
             ? "--gpu, --host-memory, --device, --device-memory, --set and --json"
             : options.target);
  const std::string text =
      format_table(memory_table(options.table, options.measured), options.format);
  if (options.out.empty()) {
    write_out(text);
  } else {
    write_file_atomically(options.out, text);
    write_out(options.out + "\n");
  }
  return 0;
}

int print_check(const MemoryOptions& options) {
  const std::vector<TrialMemoryCheck> trials = check_memory(options.check);
  write_out(options.json ? check_json(trials).dump() + "\n" : check_text(trials));
  return all_equal(trials) ? 0 : 1;
}

}  // namespace

int run_memory_command(const MemoryOptions& options, const CommonOptions& common) {
  if (!options.check.empty()) return print_check(options);
  if (!options.table.empty()) return print_table(options, common);
  if (options.target.empty())
    fail("memory: give a YAML file, a model, --check DIR, or --table with one of {}",
         fmt::join(memory_table_names(), ", "));
  if (!options.out.empty() || options.format != "text" || options.measured != memory_results_file)
    fail("--out, --format and --measured are for --table; --json writes a prediction for programs");
  MemoryTarget target = memory_target(options.gpu, common.device);
  if (!common.device_memory.empty()) limit_target(target, common.device_memory);
  if (!options.host_memory.empty()) target.host = parse_host_memory(options.host_memory);
  Library library({}, true);
  if (!is_yaml(options.target)) {
    Config config = load_config("", common.sets);
    config.model.path = options.target;
    return print_one(config, config.parallel.trials_per_gpu, library, options, target);
  }
  const Sweep sweep = load_sweep(options.target, common.sets);
  if (sweep.trials.size() == 1)
    return print_one(sweep.trials.front().config, 1, library, options, target);
  const std::vector<TrialForecast> trials = forecast(sweep, library, target);
  const std::string& why = trials.front().note;
  if (!any_known(trials) &&
      std::ranges::all_of(trials, [&](const TrialForecast& t) { return t.note == why; }))
    fail("{}", why);
  write_out((options.json ? forecast_json(sweep, trials, target).dump()
                          : forecast_table(sweep, trials, target)) +
            "\n");
  return 0;
}

}  // namespace qlab
