// The qlab command.
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "core/error.h"
#include "core/parallel.h"
#include "experiments/commands.h"
#include "experiments/config_fields.h"
#include "experiments/gpus.h"
#include "experiments/memory_tables.h"
#include "generated/version.h"

namespace {

/// Of a text that an unset variable of a shell may have left empty.
std::string not_empty(const std::string& text) {
  return text.empty() ? "give a value, not an empty text" : "";
}

/// Without a list of what each option excludes: that is told when it happens.
class HelpText : public CLI::Formatter {
  std::string make_option_opts(const CLI::Option* option) const override {
    const std::string text = CLI::Formatter::make_option_opts(option);
    return text.substr(0, text.find(" Excludes:"));
  }
};

void add_common(CLI::App* app, qlab::CommonOptions& common, bool computes = true) {
  if (computes) {
    app->add_option("--device", common.device, "auto, cpu, cuda or cuda:N")->capture_default_str();
    app->add_option("--device-memory", common.device_memory,
                    "take no more of the device than this, for example 24GiB")
        ->check(not_empty);
  }
  app->add_option("--set", common.sets,
                  "key=value of the configuration, over that of a file; may be repeated")
      ->option_text("TEXT")
      ->allow_extra_args(false);
}

void add_run(CLI::App* app, qlab::SweepOptions& options, qlab::CommonOptions& common) {
  app->add_option("file", options.file, "YAML file")->required();
  app->add_option("--out", options.out, "results directory (default: runs/<name>)")
      ->check(not_empty);
  app->add_flag("--dry-run", options.dry_run,
                "print the trials, what they need and whether it fits, and stop");
  app->add_flag(
      "--force", options.force,
      "run although the predicted memory does not fit; the allocator still ends the run at "
      "--device-memory, except with a paged optim.type, which may take what was "
      "predicted");
  app->add_option("--replicas", options.replicas,
                  "train one configuration on so many GPUs, from that of --device on: the "
                  "micro-batches of train.grad_accum are shared out, and results stay the same")
      ->check(CLI::Range(1, 64))
      ->option_text("N=1");
  app->add_flag("--profile", options.profile,
                "print where the time of the fourth step (or of a shorter run's last) goes "
                "on a GPU, operation by operation; of a sweep, one of every training");
  add_common(app, common);
}

/// Of the first argument that the parsed command does not have; "" where there is none. An option
/// that is lacking may be one that is misspelt.
std::string unknown_option(const CLI::App& app) {
  for (const CLI::App* sub : app.get_subcommands())
    for (const std::string& argument : sub->remaining()) {
      const std::string given = argument.substr(0, argument.find('='));
      const std::string name = given.substr(std::min(given.find_first_not_of('-'), given.size()));
      if (!given.starts_with('-') || name.empty()) continue;
      std::vector<std::string> names;
      for (const CLI::Option* option : sub->get_options())
        for (const std::string& known : option->get_lnames()) names.push_back("--" + known);
      const std::string near = qlab::nearest("--" + name, names);
      return fmt::format(
          "{}: qlab {} has no such option{} (qlab {} --help lists them)", given, sub->get_name(),
          near.empty() ? "" : fmt::format("; did you mean {}?", near), sub->get_name());
    }
  return "";
}

int run(int argc, char** argv) {
  CLI::App app("qlab: QLoRA ablations without Python in the way");
  app.formatter(std::make_shared<HelpText>());
  app.set_version_flag("--version", fmt::format("qlab {} ({})", qlab::version, qlab::git_commit));
  app.failure_message([](const CLI::App* used, const CLI::Error& error) {
    const std::string text = error.what(), twice = ": At Most 1 required but received ";
    if (const size_t at = text.find(twice); at != text.npos)
      return fmt::format("qlab: {} is given {} times: keep one\n", text.substr(0, at),
                         text.substr(at + twice.size()));
    return "qlab: " + CLI::FailureMessage::simple(used, error);
  });
  app.require_subcommand(1);
  qlab::CommonOptions common;
  int code = 0;

  qlab::SweepOptions sweep;
  auto* sweep_app = app.add_subcommand("sweep", "run every trial of a sweep file, and report");
  add_run(sweep_app, sweep, common);
  sweep_app->get_option("--replicas")->group("");  // refused, with what to do: not in the help
  sweep_app->add_option("--shard", sweep.shard, "I/N: every N-th trial, starting with the I-th");
  sweep_app->callback([&] { code = qlab::run_sweep_command(sweep, common); });
  auto* train_app = app.add_subcommand("train", "run one configuration");
  add_run(train_app, sweep, common);
  train_app->callback([&] { code = qlab::run_train_command(sweep, common); });

  std::string path;
  auto* report_app =
      app.add_subcommand("report", "rebuild summary and report of a results directory");
  report_app->add_option("dir", path, "results directory")->required();
  report_app->callback([&] { code = qlab::run_report_command(path); });

  auto* config_app =
      app.add_subcommand("config", "print every key, or the resolved configuration of a file");
  config_app->add_option("file", path, "YAML file");
  add_common(config_app, common, false);
  config_app->callback([&] { code = qlab::run_config_command(path, common); });

  auto* inspect_app = app.add_subcommand("inspect", "module tree, parameter counts, footprint");
  inspect_app->add_option("model", path, "directory, FILE.gguf, hub id or synthetic:NAME")
      ->required();
  add_common(inspect_app, common, false);
  inspect_app->callback([&] { code = qlab::run_inspect_command(path, common); });

  qlab::MemoryOptions memory;
  auto* memory_app = app.add_subcommand(
      "memory", "what a run needs, predicted; published tables; predictions against runs");
  memory_app->add_option("target", memory.target,
                         "YAML file, or a model: directory, FILE.gguf, hub id or synthetic:NAME");
  memory_app->add_option("--gpu", memory.gpu,
                         "a GPU's name (" + qlab::known_gpus() + ") or its memory, as 24GiB");
  memory_app->add_option(
      "--host-memory", memory.host_memory,
      "what the host has beside the GPU, as 64GiB; otherwise only the need is told");
  memory_app->add_flag("--json", memory.json,
                       "one JSON object, in bytes and seconds; of a sweep with a list of trials");
  memory_app->add_option("--table", memory.table,
                         fmt::format("a published table beside ours: {}",
                                     fmt::join(qlab::memory_table_names(), ", ")));
  memory_app
      ->add_option("--format", memory.format,
                   fmt::format("of a table: {}", fmt::join(qlab::memory_table_formats(), ", ")))
      ->capture_default_str();
  memory_app->add_option("--out", memory.out, "file for a table, in place of the terminal");
  memory_app->add_option("--measured", memory.measured, "measured runs, for a table")
      ->capture_default_str();
  memory_app->add_option("--device", common.device, "auto, cpu, cuda or cuda:N, as it is now")
      ->capture_default_str();
  memory_app->add_option("--device-memory", common.device_memory,
                         "as if the run were told to take no more of the device, for example 9GiB");
  add_common(memory_app, common, false);
  auto* memory_check = memory_app->add_option(
      "--check", memory.check,
      "alone: a results directory or a trial's: the peaks predicted for its trials, and those "
      "measured");
  for (const char* other : {"target", "--gpu", "--host-memory", "--device", "--device-memory",
                            "--set", "--table", "--format", "--out", "--measured"})
    memory_check->excludes(memory_app->get_option(other));
  for (const char* given : {"target", "--gpu", "--host-memory", "--device-memory", "--table",
                            "--out", "--measured", "--check"})
    memory_app->get_option(given)->check(not_empty);
  memory_app->callback([&] { code = qlab::run_memory_command(memory, common); });

  qlab::GenerateOptions generate;
  auto* generate_app = app.add_subcommand("generate", "continue a prompt");
  generate_app->add_option("model", generate.model, "directory, FILE.gguf or hub id")->required();
  generate_app->add_option("--prompt", generate.prompt, "text to continue")->required();
  generate_app->add_option("--adapter", generate.adapter, "PEFT adapter directory");
  generate_app->add_flag("--chat", generate.chat, "wrap the prompt as a user's turn (ChatML)");
  generate_app
      ->add_option("--max-new-tokens", generate.sampling.max_new_tokens, "stop after so many")
      ->check([](const std::string& text) {
        const bool good = !text.empty() && text.find_first_not_of("0123456789") == text.npos &&
                          text.find_first_not_of('0') != text.npos;
        return good ? "" : text + " is no whole number from 1 up";
      })
      ->capture_default_str();
  generate_app->add_option("--temperature", generate.sampling.temperature, "0: the likeliest token")
      ->check([](const std::string& text) {
        char* end = nullptr;
        const bool good = std::strtod(text.c_str(), &end) >= 0 && end != text.c_str() && *end == 0;
        return good ? ""
                    : text + " is no temperature: 0 for the likeliest token, 1 for the model's own";
      })
      ->capture_default_str();
  generate_app
      ->add_option("--top-p", generate.sampling.top_p,
                   "sample from the likeliest tokens that have this share of the probability")
      ->check([](const std::string& text) {
        char* end = nullptr;
        const double share = std::strtod(text.c_str(), &end);
        const bool good = end != text.c_str() && *end == '\0' && share >= 0 && share <= 1;
        return good ? "" : text + " is no share of the probability, from 0 to 1";
      })
      ->capture_default_str();
  generate_app->add_option("--seed", generate.sampling.seed, "of the sampling")
      ->check([](const std::string& text) {
        return text.starts_with('-') ? text + " is below 0; give a whole number from 0 up" : "";
      })
      ->capture_default_str();
  add_common(generate_app, common);
  generate_app->callback([&] {
    for (const char* name : {"--top-p", "--seed"})
      if (generate.sampling.temperature == 0 && generate_app->count(name) > 0)
        qlab::fail(
            "{} changes nothing at --temperature 0, which takes the likeliest token: give a "
            "--temperature above 0, or leave {} out",
            name, name);
    code = qlab::run_generate_command(generate, common);
  });

  qlab::EvalOptions eval;
  auto* eval_app = app.add_subcommand("eval", "loss and perplexity on a file");
  eval_app->add_option("model", eval.model, "directory, FILE.gguf, hub id or synthetic:NAME")
      ->required();
  eval_app->add_option("--data", eval.data, "JSON lines, or synthetic")->required();
  eval_app->add_option("--adapter", eval.adapter, "PEFT adapter directory");
  eval_app->add_flag("--json", eval.json, "one JSON object");
  add_common(eval_app, common);
  eval_app->callback([&] { code = qlab::run_eval_command(eval, common); });

  std::string file = "-";
  bool jsonl = false;
  auto* tokenize_app = app.add_subcommand("tokenize", "token ids of a text");
  tokenize_app->add_option("model", path, "model or tokenizer.json")->required();
  tokenize_app->add_option("file", file, "text file, or - for the standard input")
      ->capture_default_str();
  tokenize_app->add_flag("--jsonl", jsonl, "each line in is a JSON string, each line out its ids");
  tokenize_app->callback([&] { code = qlab::run_tokenize_command(path, file, jsonl); });

  std::vector<std::string> names;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(sub->get_name());
  const std::string first = argc > 1 ? argv[1] : "-";
  if (first.starts_with("-") && first != "-" && first != "-h" && first != "--help" &&
      first != "--version") {
    const std::string name = first.substr(0, first.find('='));
    const auto has = [&](const std::string& sub) {
      return app.get_subcommand(sub)->get_option_no_throw(name) != nullptr;
    };
    const std::string near = qlab::nearest(name, {"--help", "--version"});
    qlab::fail("{}: {}", name,
               name.starts_with("--") && std::ranges::any_of(names, has)
                   ? "options come behind the subcommand, as in qlab train FILE " + name
                   : "there is no such option" +
                         (near.empty() ? std::string(" (qlab --help lists what there is)")
                                       : "; did you mean " + near + "?"));
  }
  if (!first.starts_with('-') && std::find(names.begin(), names.end(), first) == names.end()) {
    const std::string near = qlab::nearest(first, names);
    qlab::fail("{}: there is no such subcommand{} ({})", first,
               near.empty() ? "" : fmt::format("; did you mean {}?", near), fmt::join(names, ", "));
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0)
      if (const std::string text = unknown_option(app); !text.empty()) qlab::fail("{}", text);
    return app.exit(error) == 0 ? 0 : 2;
  }
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  qlab::wait_without_spinning(argv);
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "qlab: %s\n", error.what());
    return 2;
  }
}
