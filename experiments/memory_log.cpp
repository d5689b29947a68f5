#include "experiments/memory_log.h"

#include <chrono>
#include <cmath>
#include <fstream>

#include "experiments/memory_text.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

constexpr double moved_share = 0.01, silence_seconds = 30, look_seconds = 1;
constexpr double loading_seconds = 0.1, loading_share = 0.01, rationed_share = 0.02;
constexpr int64_t first_steps = 3;

bool moved(int64_t from, int64_t to) {
  return std::abs(static_cast<double>(to - from)) > moved_share * static_cast<double>(from);
}
bool moved(const std::optional<int64_t>& from, const std::optional<int64_t>& to) {
  return from.has_value() != to.has_value() || (from && moved(*from, *to));
}

std::optional<int64_t> bytes_at(const Json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number()) return std::nullopt;
  return it->get<int64_t>();
}

std::optional<MemorySample> parse_line(const std::string& text) {
  const Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) return std::nullopt;
  const auto seconds = json.find("seconds"), phase = json.find("phase"), bytes = json.find("bytes");
  const auto peak = bytes_at(json, "peak");
  if (seconds == json.end() || !seconds->is_number() || phase == json.end() ||
      !phase->is_string() || bytes == json.end() || !bytes->is_object() || !peak)
    return std::nullopt;
  MemorySample sample;
  sample.seconds = seconds->get<double>();
  sample.phase = phase->get<std::string>();
  sample.shared = json.contains("shared");
  sample.step = bytes_at(json, "step");
  for (int i = 0; i < category_count; ++i)
    sample.bytes[static_cast<size_t>(i)] =
        bytes_at(*bytes, name_of(static_cast<Category>(i))).value_or(0);
  sample.peak = *peak;
  sample.device_used = bytes_at(json, "device_used");
  sample.host = bytes_at(json, "host");
  sample.host_available = bytes_at(json, "host_available");
  return sample;
}

}  // namespace

Json memory_line(const MemorySample& sample) {
  Json json = {{"seconds", std::round(sample.seconds * 1e3) / 1e3},
               {"phase", sample.phase},
               {"bytes", category_json(sample.bytes)},
               {"total", sample.total()},
               {"peak", sample.peak}};
  if (sample.shared) json["shared"] = true;
  if (sample.step) json["step"] = *sample.step;
  if (sample.device_used) json["device_used"] = *sample.device_used;
  if (sample.host) json["host"] = *sample.host;
  if (sample.host_available) json["host_available"] = *sample.host_available;
  return json;
}

MemoryLines read_memory_lines(const std::string& file) {
  MemoryLines lines;
  std::ifstream in(file);
  for (std::string text; std::getline(in, text);) {
    if (auto sample = parse_line(text))
      lines.samples.push_back(std::move(*sample));
    else
      ++lines.damaged;
  }
  return lines;
}

std::optional<int64_t> proc_bytes(const std::string& file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != ':') continue;
    char* end = nullptr;
    const char* digits = line.c_str() + key.size() + 1;
    const int64_t kib = std::strtoll(digits, &end, 10);
    return end == digits ? std::nullopt : std::optional(kib * 1024);
  }
  return std::nullopt;
}

double MemoryLog::steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

MemoryLog::MemoryLog(Device device, std::function<double()> now)
    : device_(device), now_(std::move(now)), start_(now_()) {
  begin("load");
}

void MemoryLog::use_base() {
  if (phase_ == "load") {
    end_phase();
    loading_ = std::move(pending_);
  } else {
    start_ = now_() - loading_.back().seconds;
  }
  pending_ = loading_;
  for (MemorySample& s : pending_) s.shared = used_;
  kept_ = static_cast<int64_t>(pending_.size());
  phase_.clear(), looks_ = 0, looked_ = 0, highest_ = {};
  begin("prepare");
}

void MemoryLog::begin(const char* phase) {
  if (phase_ == phase) return;
  if (!phase_.empty()) end_phase();
  phase_ = phase;
  reset_peak(device_);
  const double seconds = now_() - start_;
  if (!rationed(seconds)) keep(sample(seconds));
}

void MemoryLog::end_phase() {
  const double seconds = now_() - start_;
  if (!rationed(seconds)) keep(sample(seconds));
  if (phase_ == "load")
    load_peak_ = memory_account(device_).peak;
  else
    highest_ = highest();
}

void MemoryLog::look() {
  const double seconds = now_() - start_, since = seconds - last_.seconds;
  if (phase_ == "load") {
    if (since >= std::max(loading_seconds, loading_share * seconds)) keep(sample(seconds));
    return;
  }
  const bool early = phase_ == "train" && ++looks_ <= first_steps;
  const MemoryAccount& account = memory_account(device_);
  const bool jumped = moved(last_.total(), account.total) || moved(last_.peak, account.peak);
  if (!early && !jumped && seconds - looked_ < look_seconds) return;
  if (rationed(seconds)) return;
  looked_ = seconds;
  MemorySample s = sample(seconds);
  if (early || jumped || since >= silence_seconds || moved(last_.device_used, s.device_used) ||
      moved(last_.host, s.host))
    keep(std::move(s));
}

void MemoryLog::look_closely() { keep(sample(now_() - start_)); }

bool MemoryLog::rationed(double seconds) const {
  return kept_ >= unrationed &&
         seconds - last_.seconds < std::max(silence_seconds, rationed_share * seconds);
}

MemorySample MemoryLog::sample(double seconds) const {
  MemorySample s;
  s.seconds = seconds;
  s.phase = phase_;
  const MemoryAccount& account = memory_account(device_);
  s.bytes = account.current;
  s.peak = account.peak;
  if (device_.is_cuda()) {
    const cuda::MemoryInfo info = cuda::memory_info(device_.index);
    s.device_used = static_cast<int64_t>(info.total_bytes - info.free_bytes);
  }
  s.host = proc_bytes("/proc/self/status", "VmRSS");
  s.host_available = proc_bytes("/proc/meminfo", "MemAvailable");
  return s;
}

void MemoryLog::keep(MemorySample sample) {
  last_ = sample;
  ++kept_;
  pending_.push_back(std::move(sample));
}

std::vector<MemorySample> MemoryLog::take() {
  used_ = true;
  return std::exchange(pending_, {});
}

MemoryAccount MemoryLog::highest() const {
  const MemoryAccount& account = memory_account(device_);
  return account.peak > highest_.peak ? account : highest_;
}

}  // namespace qlab
