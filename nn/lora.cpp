#include "nn/lora.h"

#include <cmath>
#include <regex>

#include "core/ops/copy.h"
#include "core/random.h"

namespace qlab {
namespace {

const std::map<std::string, std::vector<std::string>> keywords = {
    {"attention", {"q_proj", "k_proj", "v_proj", "o_proj"}},
    {"mlp", {"gate_proj", "up_proj", "down_proj"}},
    {"all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}},
    {"qk", {"q_proj", "k_proj"}},
    {"qv", {"q_proj", "v_proj"}},
};

// libstdc++'s matcher without backtracking, which takes exponential time for (.*)*x; it refuses
// back-references.
constexpr auto syntax = std::regex::ECMAScript | std::regex_constants::__polynomial;

bool matches_name(const std::string& full, const std::string& entry) {
  return full == entry || full.ends_with("." + entry);
}

}  // namespace

double LoraSpec::scale() const {
  return alpha / (rslora ? std::sqrt(static_cast<double>(r)) : static_cast<double>(r));
}

std::vector<int> resolve_targets(const LoraSpec& spec, const std::vector<std::string>& linears) {
  std::vector<std::string> entries = spec.names;
  std::optional<std::regex> regex;
  const auto keyword = keywords.find(spec.pattern);
  if (keyword != keywords.end()) {
    entries = keyword->second;
  } else if (!spec.pattern.empty()) {
    try {
      regex.emplace(spec.pattern, syntax);
    } catch (const std::regex_error& error) {
      fail(
          "lora.targets: '{}' is neither a keyword (attention, mlp, all-linear, qk, qv) nor a "
          "regular expression: {}",
          spec.pattern, error.what());
    }
  }
  std::vector<int> found;
  std::vector<bool> used(entries.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    bool hit = regex && std::regex_match(linears[i], *regex);
    for (size_t e = 0; e < entries.size(); ++e)
      if (matches_name(linears[i], entries[e])) hit = true, used[e] = true;
    if (hit) found.push_back(static_cast<int>(i));
  }
  std::string missing = regex && found.empty() ? spec.pattern : "";
  for (size_t e = 0; e < entries.size(); ++e)
    if (!used[e]) missing += (missing.empty() ? "" : ", ") + entries[e];
  if (!missing.empty() || found.empty())
    fail(
        "lora.targets: no module matches {}; the linear modules are q_proj, k_proj, v_proj, "
        "o_proj, "
        "gate_proj, up_proj, down_proj of each layer, by full name for example {} (adapters on "
        "embed_tokens and lm_head are not supported)",
        missing.empty() ? "an empty list" : missing, linears.empty() ? "-" : linears.front());
  return found;
}

Adapter::Adapter(const LoraSpec& spec, const std::vector<Shape>& modules, uint64_t init_seed,
                 uint64_t dropout_seed, DType compute, Device device)
    : spec_(spec), shapes_(modules) {
  const MemoryName name("adapter");
  int64_t total = 0;
  for (const Shape& m : modules) total += spec.r * (m.in + m.out);
  {
    const MemoryTag tag(Category::adapters);
    parameters_ = Tensor::empty({total}, DType::f32, device);
    if (compute != DType::f32) compute_ = Tensor::empty({total}, compute, device);
  }
  {
    const MemoryTag tag(Category::gradients);
    gradients_ = Tensor::zeros({total}, DType::f32, device);
  }
  const MemoryTag tag(Category::workspace);
  const Tensor start =
      Tensor::empty({total}, DType::f32, device.is_meta() ? Device::cpu().meta() : Device::cpu());
  float* host = device.is_meta() ? nullptr : start.data<float>();
  if (host != nullptr) fill_zero(start);
  int64_t offset = 0;
  for (const Shape& m : modules) {
    const int64_t a_end = offset + spec.r * m.in, b_end = a_end + m.out * spec.r;
    const auto views = [&](const Tensor& flat) {
      return std::pair(flat.slice_rows(offset, a_end).view({spec.r, m.in}),
                       flat.slice_rows(a_end, b_end).view({m.out, spec.r}));
    };
    LoraModule& lora = modules_[m.index];
    std::tie(lora.a, lora.b) = views(parameters_);
    std::tie(lora.da, lora.db) = views(gradients_);
    std::tie(lora.a_compute, lora.b_compute) = views(compute_.defined() ? compute_ : parameters_);
    lora.scale = static_cast<float>(spec.scale());
    lora.dropout_key = stream_key(dropout_seed, m.name + ".lora_dropout");
    if (host != nullptr) {
      const uint64_t key = stream_key(init_seed, m.name + ".lora_A");
      const float bound = 1.0f / std::sqrt(static_cast<float>(m.in));
      for (int64_t row = 0; row < spec.r; ++row)
        for (int64_t col = 0; col < m.in; ++col) {
          const Philox random =
              philox(key, static_cast<uint32_t>(col >> 2), static_cast<uint32_t>(row), 0, 0);
          host[offset + row * m.in + col] = (2 * uniform(random.lane[col & 3]) - 1) * bound;
        }
    }
    offset = b_end;
  }
  copy(parameters_, start);
  synchronize(device);
  refresh();
}

const LoraModule* Adapter::find(int linear) const {
  const auto it = modules_.find(linear);
  return it == modules_.end() ? nullptr : &it->second;
}

const LoraModule& Adapter::module(const std::string& name) const {
  for (const Shape& m : shapes_)
    if (m.name == name) return modules_.at(m.index);
  fail("the adapter has no module {}", name);
}

std::vector<int64_t> Adapter::sizes() const {
  std::vector<int64_t> sizes;
  for (const Shape& m : shapes_) sizes.insert(sizes.end(), {spec_.r * m.in, m.out * spec_.r});
  return sizes;
}

void Adapter::refresh() const {
  if (spec_.dtype == DType::bf16) copy(parameters_, cast(parameters_, DType::bf16));
  if (compute_.defined()) copy(compute_, parameters_);
}

}  // namespace qlab
