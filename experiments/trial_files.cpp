#include "experiments/trial_files.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/ops/copy.h"
#include "data/json.h"
#include "data/safetensors.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

void append(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::app | std::ios::binary);
  file << text;
  file.flush();
  if (!file) fail("{}: cannot be written: {}{}", path, std::strerror(errno), disk_remedy(errno));
}

}  // namespace

TrialFiles::TrialFiles(const std::string& dir) : dir_(dir) {
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) fail("{}: cannot be created: {}", dir, error.message());
  if (auto lock = FileLock::take(path("lock"), false)) {
    lock_.emplace(std::move(*lock));
  } else {
    throw Busy(fmt::format(
        "{}: another qlab process is running this trial; wait for it, or give --out another "
        "directory",
        dir));
  }
  for (const std::string& folder : {dir_, path("state"), path("adapter")})
    remove_temporary_files(folder);
}

TrialFiles TrialFiles::reading(const std::string& dir) {
  TrialFiles files;
  files.dir_ = dir;
  return files;
}

void TrialFiles::write_config(const std::string& yaml) {
  if (!writes()) return;
  write_file_atomically(path("config.yaml"), yaml);
}

std::string TrialFiles::read_status(const std::string& dir) {
  const std::string path = dir + "/status.json";
  if (!std::filesystem::exists(path)) return "";
  const Json json = Json::parse(read_text_file(path), nullptr, false);
  // Unreadable: the trial counts as unfinished.
  if (!json.is_object() || !json.contains("status") || !json["status"].is_string()) return "";
  return json["status"].get<std::string>();
}

void TrialFiles::write_status(const Json& status) {
  if (!writes()) return;
  write_file_atomically(path("status.json"), status.dump(2) + "\n");
}

void TrialFiles::append_metrics(const Json& line) {
  if (!writes()) return;
  append(path("metrics.jsonl"), line.dump() + "\n");
  ++metrics_lines_;
}

std::vector<Json> TrialFiles::read_metrics() const {
  std::vector<Json> lines;
  std::ifstream file(path("metrics.jsonl"));
  for (std::string text; std::getline(file, text);) {
    Json line = Json::parse(text, nullptr, false);
    // A killed process may leave half a line at the end.
    if (!line.is_object() || !line.contains("step") || !line["step"].is_number_integer()) continue;
    if (line.contains("eval_loss") && !line["eval_loss"].is_number()) continue;
    lines.push_back(std::move(line));
  }
  return lines;
}

void TrialFiles::cut_metrics_after(int64_t step) {
  if (!writes()) return;
  std::string kept;
  metrics_lines_ = 0;
  for (const Json& line : read_metrics()) {
    if (line["step"].get<int64_t>() > step) continue;
    kept += line.dump() + "\n";
    ++metrics_lines_;
  }
  write_file_atomically(path("metrics.jsonl"), kept);
}

void TrialFiles::check_metrics(int64_t step, int64_t saved_lines) const {
  int64_t lines = 0;
  for (const Json& line : read_metrics()) lines += line["step"].get<int64_t>() <= step;
  if (lines < saved_lines)
    fail("metrics.jsonl has {} of the {} lines that were written up to step {}", lines, saved_lines,
         step);
}

void TrialFiles::append_memory(const MemorySample& sample) {
  if (!writes()) return;
  append(path("memory.jsonl"), memory_line(sample).dump() + "\n");
}

double TrialFiles::cut_memory_after(int64_t step) {
  if (!writes()) return 0;
  std::string kept;
  double seconds = 0;
  for (const MemorySample& sample : read_memory_lines(path("memory.jsonl")).samples) {
    if (step < 0 || sample.step > step) break;
    kept += memory_line(sample).dump() + "\n";
    seconds = sample.seconds;
  }
  write_file_atomically(path("memory.jsonl"), kept);
  return seconds;
}

void TrialFiles::log(const std::string& text) {
  if (!writes()) return;
  const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char stamp[32];
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%d %H:%M:%S", std::localtime(&now));
  append(path("log.txt"), fmt::format("{} {}\n", stamp, text));
}

void TrialFiles::save_state(const TrialProgress& progress, const Adapter& adapter,
                            const AdamW& optimizer) {
  if (!writes()) return;
  flush_to_disk(path("metrics.jsonl"));  // a power cut must not leave a state ahead of it
  std::filesystem::create_directories(path("state"));
  const auto host = [](const Tensor& t) { return t.to(Device::cpu()); };
  std::vector<std::pair<std::string, Tensor>> tensors = {
      {"parameters", host(adapter.parameters())}};
  for (const auto& [name, tensor] : optimizer.state()) tensors.emplace_back(name, host(tensor));
  synchronize(adapter.parameters().device());
  // One file holds tensors and position, so that they are replaced together.
  write_safetensors(path("state/state.safetensors"), tensors,
                    {{"format", "pt"},
                     {"step", std::to_string(progress.step)},
                     {"optimizer_steps", std::to_string(optimizer.steps())},
                     {"trained_tokens", std::to_string(progress.trained_tokens)},
                     {"tokens", std::to_string(progress.tokens)},
                     {"seconds", fmt::format("{}", progress.seconds)},
                     {"last_losses", fmt::format("{}", progress.last_losses)},
                     {"metrics_lines", std::to_string(metrics_lines_)},
                     {"loss_scale", fmt::format("{}", progress.loss_scale.factor)},
                     {"finite_steps", std::to_string(progress.loss_scale.finite)},
                     {"skipped_steps", std::to_string(progress.loss_scale.skipped)}});
}

std::optional<TrialProgress> TrialFiles::load_state(const Adapter& adapter, AdamW& optimizer) {
  const std::string file = path("state/state.safetensors");
  if (!std::filesystem::exists(file)) return std::nullopt;
  try {
    return read_state(file, adapter, optimizer);
  } catch (const OutOfMemory&) {
    throw;
  } catch (const std::exception& error) {  // of numbers that are none, too
    fail("cannot go on from the saved state: {}; remove {} to start this trial over", error.what(),
         dir_);
  }
}

TrialProgress TrialFiles::read_state(const std::string& file_path, const Adapter& adapter,
                                     AdamW& optimizer) const {
  const SafetensorsFile file(file_path);
  // Where the file is mapped: a tensor beside it would add to the peak of a run on a CPU.
  const auto saved = [&](const std::string& name, const Shape& shape, DType dtype) {
    const Bytes bytes = file.bytes(name);
    const SafetensorsEntry& entry = file.entries().at(name);
    const Shape own = to_shape(entry.shape, file_path);
    const char* wanted = dtype == DType::u8 ? "U8" : "F32";
    if (own != shape || entry.dtype != wanted)
      fail("{}: {} is {} {}, this trial needs {} {}", file_path, name, entry.dtype, own, wanted,
           shape);
    return Tensor::from_storage(
        Storage::wrap(const_cast<std::byte*>(bytes.data()), static_cast<int64_t>(bytes.size()), {}),
        0, shape, dtype);
  };
  const Tensor& parameters = adapter.parameters();
  copy(parameters, saved("parameters", parameters.shape(), DType::f32));
  synchronize(parameters.device());
  const auto text = [&](const char* key) {
    const auto it = file.metadata().find(key);
    if (it == file.metadata().end()) fail("{}: has no {}", file_path, key);
    return it->second;
  };
  const auto number = [&](const char* key) { return std::stoll(text(key)); };
  adapter.refresh();
  optimizer.restore(saved, number("optimizer_steps"));
  TrialProgress progress{
      number("step"), number("trained_tokens"), number("tokens"), std::stod(text("seconds")), {}};
  // States of older versions lack some.
  if (file.metadata().contains("metrics_lines"))
    check_metrics(progress.step, number("metrics_lines"));
  progress.last_losses = file.metadata().contains("last_losses")
                             ? std::stod(text("last_losses"))
                             : std::numeric_limits<double>::quiet_NaN();
  if (file.metadata().contains("loss_scale"))
    progress.loss_scale = {std::stof(text("loss_scale")), number("finite_steps"),
                           number("skipped_steps")};
  return progress;
}

}  // namespace qlab
