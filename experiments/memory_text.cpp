#include "experiments/memory_text.h"

#include <algorithm>

#include "nn/module_tree.h"

namespace qlab {
namespace {

using Json = nlohmann::json;

bool host_fits(const MemoryQuestion& question, const MemoryPrediction& prediction) {
  return prediction.host_peak <= question.target.host.value_or(MemoryLimits::none);
}
bool fits(const MemoryQuestion& question, const MemoryPrediction& prediction) {
  const int64_t limit = std::min(question.target.capacity.value_or(MemoryLimits::none),
                                 question.budget.value_or(MemoryLimits::none));
  return prediction.peak() <= limit && host_fits(question, prediction);
}

/// What stands behind room that is left.
std::string verdict(const MemoryQuestion& question, const MemoryPrediction& prediction) {
  if (!question.refused.empty()) return question.refused;
  if (!fits(question, prediction)) return "";
  const std::string barely = barely_text(question.target, prediction.peak());
  return barely.empty() ? "fits" : "fits " + barely;
}

// Numbers of any length end in one column; of 10 TB and more they begin further left.
std::string row(const std::string& what, int64_t bytes, const std::string& note = "") {
  const std::string numbers = fmt::format("{} {:>17}", format_bytes(bytes), with_commas(bytes));
  const size_t left = numbers.size() < 61 ? 61 - numbers.size() : 0;
  return fmt::format("  {:<{}} {}{}\n", what, left, numbers, note.empty() ? "" : "  " + note);
}

int64_t at(const CategoryBytes& bytes, Category category) {
  return bytes[static_cast<size_t>(category)];
}

std::string setting(const Config& c, size_t trials) {
  std::string text = c.quant.type;
  if (c.quant.type == "nf4")
    text += fmt::format(" in blocks of {}{}", c.quant.block_size,
                        c.quant.double_quant ? ", scales in 8 bits" : "");
  if (!c.lora.present) return text + "; no lora key: the base alone";
  text += fmt::format("; LoRA r {} on {}; {} x {} tokens, recompute {}", c.lora.r,
                      c.lora.targets.str(), c.train.batch_size, c.data.seq_len, c.train.recompute);
  if (trials > 1) text += fmt::format("; {} trials together", trials);
  return text;
}

}  // namespace

Json category_json(const CategoryBytes& bytes) {
  Json json = Json::object();
  for (int i = 0; i < category_count; ++i)
    json[name_of(static_cast<Category>(i))] = bytes[static_cast<size_t>(i)];
  return json;
}

std::string memory_text(const MemoryQuestion& question, const Config& config,
                        const MemoryPrediction& p, const std::optional<Remedy>& remedy) {
  std::string text = fmt::format("{} on {}\n", question.model, question.target.name);
  if (!question.target.note.empty()) text += question.target.note + "\n";
  text += setting(config, question.trials) + "\n";
  if (!question.refused.empty()) text += question.refused + "\n";
  if (!question.assumed.empty()) text += question.assumed + "\n";
  text += "\nthe base\n";
  const ResidentBytes& r = p.resident;
  text += row("linear weights", r.linear);
  if (r.constants > 0) text += row("quantization constants", r.constants);
  text += row("embeddings", r.embeddings);
  if (r.lm_head > 0) text += row("lm_head", r.lm_head);
  text += row("norms", r.norms) + row("rotary tables", r.tables) + row("resident", r.total());
  if (p.streamed_bytes > 0)
    text += row("streamed, in host memory", p.streamed_bytes,
                fmt::format("the weights of {} layers; two at a time among those above",
                            question.plan.streamed_layers));
  text += row("Hugging Face's footprint", question.footprint,
              "its rule: parameters alone, 16 bits where not quantized");
  const MemoryPhase& highest = p.highest();
  text += "\nat the peak, " + p.moment + "\n";
  const CategoryBytes& peak = highest.at_peak;
  text += row("base", at(peak, Category::weights) + at(peak, Category::constants),
              p.held_expanded > 0 ? format_bytes(p.held_expanded) + " of it held expanded" : "");
  if (p.trainable_params > 0) {
    text += row("adapters", at(peak, Category::adapters),
                with_commas(p.trainable_params) + " trainable parameters");
    text += row("gradients", at(peak, Category::gradients));
    text += row("optimizer states", at(peak, Category::optimizer),
                p.paged_out > 0 ? format_bytes(p.paged_out) + " more on the host, paged" : "");
    text += row("activations", at(peak, Category::activations));
  }
  text += row("workspace", at(peak, Category::workspace));
  text += row("peak", p.peak());
  if (p.host_peak > 0)
    text += row("on the host", p.host_peak,
                host_fits(question, p) ? ""
                                       : "does not fit: the host has " +
                                             format_bytes(question.target.host.value_or(0)));
  if (question.target.gpu) {
    const GpuSpec& gpu = *question.target.gpu;
    text += row("driver, CUDA context, libraries", gpu.context_bytes, gpu.context_note);
    const int64_t left = gpu.usable() - p.peak();
    text += left >= 0
                ? row("free of " + format_bytes(gpu.memory_bytes), left, verdict(question, p))
                : row("too much for " + format_bytes(gpu.memory_bytes), -left, "does not fit");
  }
  if (const auto& limit = question.target.limit) {
    const int64_t left = *limit - p.peak();
    text += left >= 0 ? row("left of --device-memory", left, verdict(question, p))
                      : row("too much for --device-memory", -left, "does not fit");
  }
  if (const auto& budget = question.budget) {
    const int64_t left = *budget - p.peak();
    const bool spares = config.train.memory_budget.text == "auto" && question.target.capacity;
    const std::string note =
        spares ? format_bytes(*question.target.capacity - *budget) + " are left to other programs"
               : "";
    text += left >= 0 ? row("left of train.memory_budget", left, note)
                      : row("too much for train.memory_budget", -left,
                            "does not fit" + (note.empty() ? "" : ": " + note));
    if (left < 0) text += fmt::format("  the least that this run can take is {}\n", needed_text(p));
  }
  if (!question.refused.empty() && !fits(question, p))
    text += "  " + question.refused + ": set quant.type to nf4, bf16, fp16 or fp32\n";
  else if (!fits(question, p))
    text += "  " +
            way_out(remedy, question.target, question.budget.value_or(MemoryLimits::none), p.peak(),
                    p.host_peak) +
            "\n";
  if (p.trainable_params > 0) {
    if (config.train.recompute == "auto") text += "\nplan: " + describe(question.plan) + "\n";
    const RunPlan& plan = question.plan;
    if (question.refused.empty())
      text += fmt::format("\na step in about {}: {} of {} tokens, {}{}; the update, {} ({})\n",
                          duration_text(plan.step_seconds),
                          config.train.grad_accum == 1
                              ? "one micro-batch"
                              : fmt::format("{} micro-batches", config.train.grad_accum),
                          with_commas(question.tokens), duration_text(plan.seconds.micro),
                          config.train.grad_accum == 1 ? "" : " each",
                          duration_text(plan.seconds.update), rates_origin(question.target).text);
  }
  text += "\nthe largest tensors then\n";
  for (size_t i = 0; i < std::min<size_t>(5, p.at_peak.size()); ++i) {
    const LiveTensor& t = p.at_peak[i];
    text += fmt::format("  {:>10}  {}  {}  ({})\n", format_bytes(t.bytes), t.name, t.kind,
                        name_of(t.category));
  }
  return text;
}

Json memory_json(const MemoryQuestion& question, const MemoryPrediction& p,
                 const std::optional<Remedy>& remedy) {
  const ResidentBytes& r = p.resident;
  const bool computes = question.refused.empty(), trains = p.trainable_params > 0;
  const auto of_step = [trains](auto value) { return trains ? Json(value) : Json(); };
  const auto seconds = [&](double s) { return computes ? of_step(s) : Json(); };
  RunPlan plan = question.plan;  // as training tells it
  plan.resident = p.held_expanded;
  Json json = {{"model", question.model},
               {"device", question.target.name},
               {"footprint_bytes", question.footprint},
               {"resident",
                {{"linear", r.linear},
                 {"constants", r.constants},
                 {"embeddings", r.embeddings},
                 {"lm_head", r.lm_head},
                 {"norms", r.norms},
                 {"rotary_tables", r.tables},
                 {"total", r.total()}}},
               {"held_expanded_bytes", p.held_expanded},
               {"trainable_params", p.trainable_params},
               {"categories", category_json(p.highest().at_peak)},
               {"peak_bytes", p.peak()},
               {"peak_moment", p.moment},
               {"plan", of_step(describe(plan))},
               {"step_seconds", seconds(question.plan.step_seconds)},
               {"micro_batch_seconds", seconds(question.plan.seconds.micro)},
               {"update_seconds", seconds(question.plan.seconds.update)},
               {"rates", rates_origin(question.target).word},
               {"step_tokens", of_step(question.tokens)},
               {"step_bytes", p.step_bytes},
               {"host_bytes", p.host_peak},
               {"streamed_layers", question.plan.streamed_layers},
               {"streamed_bytes", p.streamed_bytes},
               {"paged_out_bytes", p.paged_out}};
  if (!question.target.note.empty()) json["device_note"] = question.target.note;
  if (!question.assumed.empty()) json["assumed"] = question.assumed;
  if (!computes) json["refused"] = question.refused;
  if (question.target.gpu) {
    const GpuSpec& gpu = *question.target.gpu;
    json["memory_bytes"] = gpu.memory_bytes;
    json["context_bytes"] = gpu.context_bytes;
    json["context_measured"] = gpu.measured;
  }
  if (question.budget) json["budget_bytes"] = *question.budget;
  if (question.target.host) {
    json["host_memory_bytes"] = *question.target.host;
    json["host_fits"] = host_fits(question, p);
  }
  if (question.target.limit) json["device_memory_bytes"] = *question.target.limit;
  if (question.target.capacity || question.budget || question.target.host) {
    json["fits"] = computes ? Json(fits(question, p)) : Json();
    if (remedy)
      json["fits_with"] = {{"set", remedy->sets},
                           {"peak_bytes", remedy->peak},
                           {"host_bytes", remedy->host_peak},
                           {"step_seconds", of_step(remedy->step_seconds)},
                           {"trials", remedy->trials}};
  }
  json["largest"] = Json::array();
  for (size_t i = 0; i < std::min<size_t>(5, p.at_peak.size()); ++i) {
    const LiveTensor& t = p.at_peak[i];
    json["largest"].push_back({{"name", t.name},
                               {"kind", t.kind},
                               {"category", name_of(t.category)},
                               {"bytes", t.bytes}});
  }
  // Phases with what is held beside a step; inside the step, place by place, with the step alone.
  json["timeline"] = Json::array();
  for (const MemoryPhase& phase : p.phases)
    json["timeline"].push_back(
        {{"phase", phase.name}, {"held", category_json(phase.held)}, {"peak_bytes", phase.peak}});
  json["step"] = Json::array();
  for (const StepPlan::Moment& m : p.step)
    json["step"].push_back(
        {{"place", m.place}, {"bytes", sum(m.bytes)}, {"categories", category_json(m.bytes)}});
  return json;
}

}  // namespace qlab
