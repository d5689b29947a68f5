#include "nn/lora.h"

#include <cmath>
#include <regex>

#include "core/ops/add.h"
#include "core/ops/copy.h"
#include "core/ops/dropout.h"
#include "core/ops/gemm.h"
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

bool matches(const std::regex& regex, const std::string& name) {
  try {
    return std::regex_match(name, regex);
  } catch (const std::regex_error&) {
    fail("lora.targets: the regular expression is too complex to match {}", name);
  }
}

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
      regex.emplace(spec.pattern, std::regex::ECMAScript);
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
    bool hit = regex && matches(*regex, linears[i]);
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
  std::vector<float> host(device.is_meta() ? 0 : static_cast<size_t>(total));
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
    if (!host.empty()) {
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
  if (!host.empty()) copy(parameters_, Tensor::from_vector(host, {total}, Device::cpu()));
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

void Adapter::refresh() const {
  if (spec_.dtype == DType::bf16) copy(parameters_, cast(parameters_, DType::bf16));
  if (compute_.defined()) copy(compute_, parameters_);
}

namespace {

struct Part {  // one segment's adapter on one module
  int64_t begin, end;
  const LoraModule* lora;
  DropoutKey dropout;
};

std::vector<Part> parts_of(const Linear& module, const Batch& batch) {
  std::vector<Part> parts;
  for (const Segment& s : batch.segments)
    if (s.adapter != nullptr && s.end > s.begin)
      if (const LoraModule* lora = s.adapter->find(module.index)) {
        const double p = s.dropout ? s.adapter->spec().dropout : 0;
        parts.push_back({s.begin, s.end, lora, {lora->dropout_key, static_cast<float>(p)}});
      }
  return parts;
}

Tensor dropped(const Tensor& x, const Part& part, const Batch& batch) {
  const Tensor rows = x.slice_rows(part.begin, part.end);
  if (part.dropout.p == 0) return rows;
  return dropout(rows, batch.examples.slice_rows(part.begin, part.end),
                 batch.positions.slice_rows(part.begin, part.end), part.dropout);
}

// r columns at a pitch of 16, so that every row starts aligned whatever r is.
Tensor low_rank(int64_t rows, int64_t r, const Tensor& like) {
  return Tensor::pitched(rows, r, (r + 15) / 16 * 16, like.dtype(), like.device());
}

Tensor lora_backward(const Tensor& g, const Node& node, const Linear& module, const Batch& batch,
                     const std::vector<Part>& parts) {
  Tensor dx;
  if (node.needs(0)) dx = matmul_nn(g, module.weight.dense(g.dtype(), g.device()));
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    const LoraModule& lora = *part.lora;
    const Tensor dy = g.slice_rows(part.begin, part.end);
    const int64_t rows = part.end - part.begin, r = lora.a.dim(0);
    const Tensor s = node.saved("linear.s").slice_rows(part.begin, part.end).slice_cols(0, r);
    gemm(lora.db, dy, Op::transpose, s, Op::none, lora.scale, 1.0f);
    const Tensor ds = low_rank(rows, r, g);
    gemm(ds, dy, Op::none, lora.b_compute, Op::none, lora.scale);
    gemm(lora.da, ds, Op::transpose, dropped(node.saved("linear.x"), part, batch), Op::none, 1.0f,
         1.0f);
    if (!dx.defined()) continue;
    const Tensor target = dx.slice_rows(part.begin, part.end);
    if (part.dropout.p == 0) {
      gemm(target, ds, Op::none, lora.a_compute, Op::none, 1.0f, 1.0f);
    } else {
      dropout_add(target, matmul_nn(ds, lora.a_compute),
                  batch.examples.slice_rows(part.begin, part.end),
                  batch.positions.slice_rows(part.begin, part.end), part.dropout);
    }
  }
  return dx;
}

}  // namespace

Variable linear(Tape& tape, const Variable& x, const Linear& module, const Batch& batch) {
  const Tensor y = matmul_nt(x.value, module.weight.dense(x.value.dtype(), x.value.device()));
  if (module.bias.defined()) add_bias(y, module.bias);
  const std::vector<Part> parts = parts_of(module, batch);
  Tensor s;  // A dropout(x) of every segment, at the widest rank
  int64_t width = 0;
  for (const Part& part : parts) width = std::max(width, part.lora->a.dim(0));
  if (width > 0) s = low_rank(x.value.dim(0), width, x.value);
  for (const Part& part : parts) {
    const LoraModule& lora = *part.lora;
    const Tensor rows = s.slice_rows(part.begin, part.end).slice_cols(0, lora.a.dim(0));
    gemm(rows, dropped(x.value, part, batch), Op::none, lora.a_compute, Op::transpose);
    gemm(y.slice_rows(part.begin, part.end), rows, Op::none, lora.b_compute, Op::transpose,
         lora.scale, 1.0f);
  }
  std::vector<Slot> slots;
  if (!parts.empty()) slots = {{"linear.x", x.value}, {"linear.s", s}};
  return tape.record(
      "linear", y, {x}, std::move(slots),
      [&module, batch, parts](const Tensor& g, const Node& node) {
        return std::vector<Tensor>{lora_backward(g, node, module, batch, parts)};
      },
      !parts.empty());
}

}  // namespace qlab
