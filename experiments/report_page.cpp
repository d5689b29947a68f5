#include "experiments/report_page.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace qlab {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxPoints = 600;  // of one curve; more are averaged in equal pieces

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

Json trial_json(const TrialResult& trial) {
  Json json{{"name", trial.name},         {"directory", trial.directory}, {"seed", trial.seed},
            {"status", trial.status},     {"error", trial.error},         {"swept", trial.swept},
            {"train", curve(trial.train)}};
  for (const Column& column : summary_columns()) json[column.name] = number(trial.*column.value);
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

std::string page_data(const Results& results) {
  Json json{{"name", results.name},     {"method", results.method},
            {"metric", results.metric}, {"goal", results.goal},
            {"keys", results.keys},     {"environment", results.environment},
            {"shared", results.shared}, {"several_seeds", results.several_seeds}};
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
  out += "</script>\n</body>\n</html>\n";
  return out;
}

}  // namespace qlab
