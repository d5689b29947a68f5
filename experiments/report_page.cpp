#include "experiments/report_page.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "experiments/throughput.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxPoints = 600;   // of one curve; more are averaged in equal pieces
constexpr size_t kMaxMoments = 240;  // of a trial's memory; of more, the highest of equal pieces

Json number(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

Json curve(const std::vector<LossPoint>& points) {
  const size_t pieces = std::min(points.size(), kMaxPoints);
  Json out = Json::array();
  for (size_t i = 0; i < pieces; ++i) {
    const size_t begin = i * points.size() / pieces, end = (i + 1) * points.size() / pieces;
    double loss = 0;
    for (size_t j = begin; j < end; ++j) loss += points[j].loss;
    const LossPoint& last = points[end - 1];
    out.push_back({last.step, last.tokens, loss / static_cast<double>(end - begin)});
  }
  return out;
}

Json moment(const MemorySample& s) {
  const auto optional = [](const std::optional<int64_t>& value) {
    return value ? Json(*value) : Json(nullptr);
  };
  return {s.seconds, s.phase, optional(s.step),        s.bytes,
          s.total(), s.peak,  optional(s.device_used), optional(s.host),
          s.shared};
}

Json moments(const std::vector<MemorySample>& samples) {
  const size_t pieces = std::min(samples.size(), kMaxMoments);
  Json out = Json::array();
  for (size_t i = 0; i < pieces; ++i) {
    const auto at = [&](size_t piece) {
      return samples.begin() + static_cast<std::ptrdiff_t>(piece * samples.size() / pieces);
    };
    const auto first = i + 1 == pieces ? at(pieces) - 1 : at(i);  // the last one stays
    out.push_back(moment(*std::max_element(
        first, at(i + 1), [](const auto& a, const auto& b) { return a.total() < b.total(); })));
  }
  return out;
}

/// What each phase took in all: its time, and the highest of everything.
Json phase_rows(const std::vector<MemorySample>& samples) {
  Json rows = Json::array();
  const auto raise = [](Json& value, const std::optional<int64_t>& other) {
    if (other && (value.is_null() || value.get<int64_t>() < *other)) value = *other;
  };
  for (size_t i = 0; i < samples.size(); ++i) {
    const MemorySample& s = samples[i];
    auto row = std::find_if(rows.begin(), rows.end(), [&](const Json& r) {
      return r["phase"] == s.phase && r["shared"] == s.shared;
    });
    if (row == rows.end()) {
      rows.push_back({{"phase", s.phase},
                      {"shared", s.shared},
                      {"seconds", 0.0},
                      {"peak", nullptr},
                      {"device_used", nullptr},
                      {"host", nullptr}});
      row = std::prev(rows.end());
    }
    if (i + 1 < samples.size())
      (*row)["seconds"] =
          (*row)["seconds"].get<double>() + std::max(samples[i + 1].seconds - s.seconds, 0.0);
    raise((*row)["peak"], s.peak);
    raise((*row)["device_used"], s.device_used);
    raise((*row)["host"], s.host);
  }
  return rows;
}

Json memory_json(const TrialResult& trial) {
  if (trial.memory.samples.empty()) return nullptr;
  return {{"moments", moments(trial.memory.samples)},
          {"phases", phase_rows(trial.memory.samples)},
          {"predicted", number(trial.predicted_peak_bytes)},
          {"resumed", trial.resumed},
          {"before", number(trial.peak_before)},
          {"damaged", trial.memory.damaged}};
}

Json trial_json(const TrialResult& trial) {
  Json json{{"name", trial.name},
            {"directory", trial.directory},
            {"seed", trial.seed},
            {"status", trial.status},
            {"status_text", status_text(trial)},
            {"error", trial.error},
            {"swept", trial.swept},
            {"train", curve(trial.train)},
            {"memory", memory_json(trial)}};
  for (const Column& column : summary_columns()) json[column.name] = number(trial.*column.value);
  json["gang"] = number(trial.gang);
  json["moved_bytes"] = number(trial.moved_bytes);
  json["stalled_seconds"] = number(trial.stalled_seconds);
  json["eval"] = Json::array();
  for (const LossPoint& p : trial.eval) json["eval"].push_back({p.step, p.tokens, p.loss});
  return json;
}

Json group_json(const SeedGroup& group) {
  Json json{{"swept", group.swept}, {"n", group.trials.size()}};
  for (const Column& column : summary_columns()) {
    const Spread s = spread(group, column.value);
    json[column.name] = {number(s.mean), number(s.deviation)};
  }
  return json;
}

std::optional<double> median_speed(const Results& results) {
  std::vector<double> speeds;
  for (const TrialResult& trial : results.trials)
    if (trial.tokens_per_s) speeds.push_back(*trial.tokens_per_s);
  return speeds.empty() ? std::nullopt : std::optional(median(std::move(speeds)));
}

std::string page_data(const Results& results) {
  Json json{{"name", results.name},     {"method", results.method},
            {"metric", results.metric}, {"goal", results.goal},
            {"keys", results.keys},     {"environment", results.environment},
            {"shared", results.shared}, {"several_seeds", results.several_seeds}};
  json["derived"] = results.derived;
  json["median_tokens_per_s"] = number(median_speed(results));
  json["categories"] = Json::array();
  for (int i = 0; i < category_count; ++i)
    json["categories"].push_back(name_of(static_cast<Category>(i)));
  json["trials"] = Json::array();
  for (const TrialResult& trial : results.trials) json["trials"].push_back(trial_json(trial));
  json["groups"] = Json::array();
  if (results.several_seeds) {
    for (const SeedGroup& group : seed_groups(results)) json["groups"].push_back(group_json(group));
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string escaped(const std::string& text) {
  return replaced(replaced(text, "&", "&amp;"), "<", "&lt;");
}

}  // namespace

std::string report_page(const Results& results, const std::string& chart_js) {
  std::string out = "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n";
  out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
  out += "<title>" + escaped(results.name) + " - qlab report</title>\n<style>\n";
  out += report_style;
  out += "</style>\n</head>\n";
  out += report_body;
  // A "<" inside JSON text could otherwise end the element.
  out += "<script type=\"application/json\" id=\"data\">" +
         replaced(page_data(results), "<", "\\u003c") + "</script>\n";
  if (!chart_js.empty()) {
    out += "<script>\n" + replaced(chart_js, "</script", "<\\/script") + "\n</script>\n";
  }
  out += "<script>\n";
  out += report_script;
  out += report_memory_script;
  out += "start();\n";
  out += "</script>\n</body>\n</html>\n";
  return out;
}

}  // namespace qlab
