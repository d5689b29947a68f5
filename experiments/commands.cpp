#include "experiments/commands.h"

#include <yaml-cpp/yaml.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "data/file.h"
#include "experiments/gpus.h"
#include "experiments/profile_table.h"
#include "experiments/replica_processes.h"
#include "experiments/report.h"
#include "experiments/runner.h"
#include "experiments/terminal.h"
#include "nn/adapter_file.h"
#include "nn/module_tree.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

// With --device-memory the allocator behaves as if the device had no more. Replicas have the GPUs
// that follow on the first one's.
Device open_device(const CommonOptions& common, int rank = 0) {
  Device device = parse_device(common.device);
  if (device.is_cuda()) device = Device::cuda(device.index + rank);
  if (device.is_cuda()) {
    cuda::set_device(device.index);
    compute_capability(device);  // throws where there is no code for this GPU
  }
  if (common.device_memory.empty()) return device;
  limit_memory(device, parse_device_memory(common.device_memory));
  return device;
}

// Before anything is loaded or started.
void check_replicas(int replicas, const Config& config, const CommonOptions& common) {
  const TrainConfig& t = config.train;
  if (t.grad_accum < replicas) {
    const int64_t window = t.batch_size * t.grad_accum;
    fail(
        "--replicas {}: train.grad_accum is {}: a window has {}, and {} replicas need one each; "
        "set train.grad_accum to {}",
        replicas, t.grad_accum,
        t.grad_accum == 1 ? "one micro-batch" : fmt::format("{} micro-batches", t.grad_accum),
        replicas,
        window % replicas == 0 ? fmt::format("{} and train.batch_size to {} for the same window",
                                             replicas, window / replicas)
                               : fmt::format("{} or more", replicas));
  }
  const Device first = parse_device(common.device);
  if (!first.is_cuda()) return;
  if (const int gpus = cuda::device_count(); first.index + replicas > gpus)
    fail("--replicas {}: from {} on there {}; give --replicas as many, or --device another one",
         replicas, first.str(),
         gpus - first.index == 1 ? "is 1 GPU" : fmt::format("are {} GPUs", gpus - first.index));
  if (const std::string why = cuda::why_no_nccl(); !why.empty())
    fail("--replicas {}: {}", replicas, why);
}

/// The other replicas, which are told what to train.
std::unique_ptr<ReplicaProcesses> start_replicas(int size, const Config& config) {
  auto processes = std::make_unique<ReplicaProcesses>(size);
  processes->replicas().tell(to_yaml(config));
  return processes;
}

/// A process that start_replicas() has started.
int run_replica(Replicas& replicas, const SweepOptions& options, const CommonOptions& common) {
  try {
    Config config = parse_config(YAML::Load(replicas.tell("")), "the run's configuration");
    resolve(config);
    const Device device = open_device(common, replicas.rank());
    replicas.connect(device);
    assist(replicas, config, device, options.force);
    return 0;
  } catch (const RankZeroGone&) {
    return 0;
  } catch (const std::exception& error) {
    replicas.report(error.what());
    return 2;
  }
}

int run(const Sweep& sweep, const SweepOptions& options, const CommonOptions& common) {
  for (const Trial& trial : sweep.trials) check_computable(trial.config, sweep.source_file);
  const Config& first = sweep.trials.front().config;
  if (options.replicas > 1) check_replicas(options.replicas, first, common);
  Terminal terminal;
  catch_interrupts(true);
  std::unique_ptr<ReplicaProcesses> processes;
  if (options.replicas > 1 && !options.dry_run) processes = start_replicas(options.replicas, first);
  Replicas* const others = processes != nullptr ? &processes->replicas() : nullptr;
  const Device device = open_device(common);
  if (others != nullptr) others->connect(device);
  if (const int64_t last = first.train.grad_accum % options.replicas; last != 0)
    terminal.print(
        fmt::format("note: of {} replicas {} {} nothing to do in the last round of each step: "
                    "train.grad_accum is {}",
                    options.replicas, options.replicas - last,
                    options.replicas - last == 1 ? "has" : "have", first.train.grad_accum));
  TrainCallbacks callbacks = terminal.callbacks();
  bool profiled = false;
  if (options.profile) {
    if (!device.is_cuda())
      fail("--profile times the kernels of a GPU, and this run is on {}", device.str());
    const Ceilings ceilings = measure_ceilings(device);  // now, while there is room for it
    callbacks.profile = [&terminal, &profiled, ceilings](const Profile& profile) {
      profiled = true;
      terminal.print(profile_table(profile, ceilings));
    };
  }
  const char* again = "interrupted; the same command continues where this one stopped";
  RunnerResult result;
  try {
    result = run_sweep(
        sweep,
        {options.out, device, options.shard, options.dry_run, options.force, options.replicas,
         others},
        [&](const std::string& line) { terminal.print(line); }, callbacks);
  } catch (const Interrupted&) {  // nothing has been written yet
    terminal.print(again);
    return 130;
  }
  if (options.dry_run) return 0;
  if (options.profile && !profiled)
    terminal.print(
        "--profile: no step was profiled: the run had none left to take, or ended early");
  terminal.print(summary_table(result.dir));
  terminal.print("report " + result.dir + "/report.html");
  if (result.interrupted) {
    terminal.print(again);
    return 130;
  }
  return result.failed + result.elsewhere > 0 ? 1 : 0;
}

// What --set can change of a model that is loaded, and not trained.
const std::vector<std::string> kLoading{"model.embeddings",   "model.streamed_layers",
                                        "quant.type",         "quant.block_size",
                                        "quant.double_quant", "quant.compute_dtype"};

// The model of eval, generate and inspect is their argument; --set gives the rest, of the keys and
// blocks that they read.
Config config_for(const std::string& model, const CommonOptions& common,
                  const std::vector<std::string>& reads) {
  Config config = load_config("", common.sets);
  for (const auto& [key, where] : config.origins) {
    if (key == "model.path") fail("{}: the model is the command's first argument", where);
    const std::string block = key.substr(0, key.find('.'));
    const auto read = [&](const std::string& name) { return name == key || name == block; };
    if (!std::ranges::any_of(reads, read))
      fail("{}: {} changes nothing here: this command reads {}{}", where, key,
           fmt::join(reads, ", "),
           block == "lora" ? "; an adapter comes with --adapter and has its own" : "");
  }
  config.model.path = model;
  return config;
}

struct Loaded {
  Library library;
  Config config;
  const Llama* model = nullptr;
  std::unique_ptr<Adapter> adapter;
};

void load(Loaded& loaded, const std::string& adapter_dir, const CommonOptions& common) {
  const Device device = open_device(common);
  LoraSpec spec;
  if (!adapter_dir.empty()) spec = read_adapter_spec(adapter_dir);
  loaded.model = &loaded.library.base(loaded.config, compute_dtype(loaded.config, device), device);
  if (adapter_dir.empty()) return;
  loaded.adapter =
      std::make_unique<Adapter>(spec, loaded.model->adapter_shapes(spec), 0, 0,
                                loaded.model->adapter_dtype(spec), loaded.model->device());
  load_adapter(adapter_dir, *loaded.adapter);
}

}  // namespace

int run_sweep_command(const SweepOptions& options, const CommonOptions& common) {
  if (options.replicas > 1)
    fail(
        "--replicas {}: a sweep gives each GPU trials of its own, with nothing to exchange: start "
        "one `qlab sweep FILE --shard I/N --device cuda:I` for each of N GPUs; --replicas is for "
        "`qlab train` of one configuration",
        options.replicas);
  return run(load_sweep(options.file, common.sets), options, common);
}

int run_train_command(const SweepOptions& options, const CommonOptions& common) {
  if (const auto replicas = join_replicas()) return run_replica(*replicas, options, common);
  load_config(options.file, common.sets);  // refuses a sweep file
  return run(load_sweep(options.file, common.sets), options, common);
}

int run_report_command(const std::string& dir) {
  const ReportResult result = write_report(dir);
  for (const std::string& file : result.files) write_out(file + "\n");
  for (const std::string& note : result.notes) write_out(note + "\n");
  return 0;
}

int run_config_command(const std::string& file, const CommonOptions& common) {
  if (file.empty() && common.sets.empty())
    write_out(config_table());
  else
    write_out(to_yaml(load_config(file, common.sets)));
  return 0;
}

int run_inspect_command(const std::string& model, const CommonOptions& common) {
  const Config config = config_for(model, common, {"quant", "lora"});
  const LlamaConfig llama = open_model(model).config;
  const WeightSpec spec = weight_spec(config);
  const std::optional<LoraSpec> lora =
      config.lora.present ? std::optional(lora_spec(config)) : std::nullopt;
  write_out(module_tree(llama, spec, lora));
  write_out("\n" + trainable_line(count_parameters(llama, lora)) + "\n");
  write_out(fmt::format("source dtype: {}\n",
                        llama.source_dtype.empty() ? "unknown" : llama.source_dtype));
  const int64_t footprint = hf_footprint(llama, spec, lora);
  const int64_t resident = resident_bytes(llama, spec, lora);
  write_out(
      fmt::format("memory footprint: {:.2f} GB ({} bytes; Hugging Face's rule: parameters alone, "
                  "16 bits where not quantized)\n",
                  static_cast<double>(footprint) / 1e9, with_commas(footprint)));
  write_out(fmt::format("resident: {:.3f} GB ({} bytes; with quantization constants and tables)\n",
                        static_cast<double>(resident) / 1e9, with_commas(resident)));
  return 0;
}

int run_generate_command(const GenerateOptions& options, const CommonOptions& common) {
  Loaded loaded;
  if (options.model.starts_with("synthetic:"))
    fail("{}: a synthetic model has random weights and no tokenizer; nothing to generate",
         options.model);
  loaded.config = config_for(options.model, common, kLoading);
  check_computable(loaded.config, options.model);
  const Tokenizer tokenizer = Tokenizer::load(options.model);
  if (options.chat &&
      (tokenizer.token_id("<|im_start|>") < 0 || tokenizer.token_id("<|im_end|>") < 0))
    fail("--chat: the vocabulary of {} has no <|im_start|> and <|im_end|>", options.model);
  load(loaded, options.adapter, common);
  const std::string text =
      options.chat ? "<|im_start|>user\n" + options.prompt + "<|im_end|>\n<|im_start|>assistant\n"
                   : options.prompt;
  std::vector<int32_t> ids = tokenizer.encode(text);
  ids.insert(ids.begin(), tokenizer.prefix_ids().begin(), tokenizer.prefix_ids().end());
  if (!options.chat) write_out(options.prompt);
  catch_interrupts(false);
  generate(*loaded.model, loaded.adapter.get(), ids, tokenizer.stop_ids(), options.sampling,
           [&](int32_t id) {
             if (!tokenizer.is_special(id)) write_out(tokenizer.token_bytes(id));
             std::fflush(stdout);
             return !interrupted();
           });
  write_out("\n");
  return interrupted() ? 130 : 0;
}

int run_eval_command(const EvalOptions& options, const CommonOptions& common) {
  Loaded loaded;
  // Data first: a mistake there should not cost the loading of a model.
  std::vector<std::string> reads = kLoading;
  reads.insert(reads.end(), {"data.eval_seq_len", "data.completion_only", "data.template"});
  loaded.config = config_for(options.model, common, reads);
  check_computable(loaded.config, options.model);
  loaded.config.data.eval = options.data;
  const Dataset& data = loaded.library.eval_set(loaded.config);
  load(loaded, options.adapter, common);
  Stepper stepper(*loaded.model, Recompute::none);
  catch_interrupts(false);
  const Evaluation result = evaluate(
      stepper, data, loaded.adapter.get(), [](size_t) { return interrupted(); },
      evaluation_tokens(loaded.model->device()));
  if (result.stopped) return 130;
  const double perplexity = std::exp(result.loss);
  if (options.json) {
    write_out(Json{{"loss", result.loss},
                   {"perplexity", perplexity},
                   {"examples", data.examples.size()},
                   {"tokens", result.tokens},
                   {"trained_tokens", result.trained_tokens},
                   {"truncated", data.truncated},
                   {"dropped", data.dropped}}
                  .dump() +
              "\n");
  } else {
    write_out(fmt::format(
        "loss {:.6f}  perplexity {:.4f}\n{} examples, {} tokens, {} of them trained; {} "
        "cut at {} tokens, {} dropped\n",
        result.loss, perplexity, data.examples.size(), result.tokens, result.trained_tokens,
        data.truncated, loaded.config.data.eval_seq_len, data.dropped));
  }
  return 0;
}

int run_tokenize_command(const std::string& model, const std::string& file, bool jsonl) {
  if (model.starts_with("synthetic:"))
    fail("{}: a synthetic model has no tokenizer; give a real model or a tokenizer.json", model);
  const Tokenizer tokenizer = Tokenizer::load(model);
  std::ifstream opened;
  if (file != "-") {
    if (std::filesystem::is_directory(file)) fail("{}: is a directory; give a text file", file);
    opened.open(file, std::ios::binary);
    if (!opened) fail("{}: cannot be read", file);
  }
  std::istream& in = file == "-" ? std::cin : opened;
  if (!jsonl) {
    const std::string text(std::istreambuf_iterator<char>(in), {});
    std::string line;
    for (const int32_t id : tokenizer.encode(text)) line += std::to_string(id) + " ";
    if (!line.empty()) line.back() = '\n';
    write_out(line);
    return 0;
  }
  int64_t number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    const Json json = Json::parse(line, nullptr, false);
    if (!json.is_string())
      fail("{}:{}: each line must be one JSON string", file == "-" ? "standard input" : file,
           number);
    write_out(Json(tokenizer.encode(json.get<std::string>())).dump() + "\n");
  }
  return 0;
}

}  // namespace qlab
