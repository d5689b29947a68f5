#include "nn/module_tree.h"

#include <set>

namespace qlab {

std::vector<Adapter::Shape> linear_shapes(const LlamaConfig& c) {
  std::vector<Adapter::Shape> shapes;
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    const std::string attention = fmt::format("model.layers.{}.self_attn.", l);
    const std::string mlp = fmt::format("model.layers.{}.mlp.", l);
    const auto add = [&](const std::string& name, int64_t in, int64_t out) {
      shapes.push_back({static_cast<int>(shapes.size()), name, in, out});
    };
    add(attention + "q_proj", c.hidden_size, c.q_size());
    add(attention + "k_proj", c.hidden_size, c.kv_size());
    add(attention + "v_proj", c.hidden_size, c.kv_size());
    add(attention + "o_proj", c.q_size(), c.hidden_size);
    add(mlp + "gate_proj", c.hidden_size, c.intermediate_size);
    add(mlp + "up_proj", c.hidden_size, c.intermediate_size);
    add(mlp + "down_proj", c.intermediate_size, c.hidden_size);
  }
  return shapes;
}

namespace {

std::set<int> adapted(const LlamaConfig& config, const std::optional<LoraSpec>& lora) {
  if (!lora) return {};
  std::vector<std::string> names;
  for (const Adapter::Shape& s : linear_shapes(config)) names.push_back(s.name);
  const std::vector<int> found = resolve_targets(*lora, names);
  return {found.begin(), found.end()};
}

// One module per line, two spaces a level.
class Printer {
 public:
  void open(const std::string& text) { line(text), ++depth_; }
  void close() { --depth_, line(")"); }
  void line(const std::string& text) { out_ += std::string(2 * depth_, ' ') + text + "\n"; }
  std::string take() { return std::move(out_); }

 private:
  std::string out_;
  int depth_ = 0;
};

struct TreeContext {
  const LlamaConfig& config;
  const WeightSpec& spec;
  const std::optional<LoraSpec>& lora;
  std::set<int> targets;
  std::vector<Adapter::Shape> shapes;
};

/// What bitsandbytes puts in the place of Linear.
const char* linear_class(const WeightSpec& spec) {
  if (spec.format == WeightFormat::nf4) return "Linear4bit";
  return spec.format == WeightFormat::int8 ? "Linear8bitLt" : "Linear";
}

std::string base_linear(const TreeContext& t, const Adapter::Shape& s) {
  const LlamaConfig& c = t.config;
  const std::string name = s.name.substr(s.name.rfind('.') + 1);
  const bool mlp = s.name.find(".mlp.") != std::string::npos;
  const bool bias = mlp ? c.mlp_bias : name == "o_proj" ? c.o_bias : c.qkv_bias;
  return fmt::format("{}(in_features={}, out_features={}, bias={})", linear_class(t.spec), s.in,
                     s.out, bias ? "True" : "False");
}

void print_linear(Printer& p, const TreeContext& t, const Adapter::Shape& s) {
  const std::string name = s.name.substr(s.name.rfind('.') + 1);
  if (!t.targets.contains(s.index)) return p.line(fmt::format("({}): {}", name, base_linear(t, s)));
  p.open(fmt::format("({}): lora.{}(", name, linear_class(t.spec)));
  p.line("(base_layer): " + base_linear(t, s));
  const auto dictionary = [&](const char* key, const std::string& entry) {
    p.open(fmt::format("({}): ModuleDict(", key));
    p.line("(default): " + entry);
    p.close();
  };
  dictionary("lora_dropout", t.lora->dropout > 0
                                 ? fmt::format("Dropout(p={}, inplace=False)", t.lora->dropout)
                                 : "Identity()");
  dictionary("lora_A",
             fmt::format("Linear(in_features={}, out_features={}, bias=False)", s.in, t.lora->r));
  dictionary("lora_B",
             fmt::format("Linear(in_features={}, out_features={}, bias=False)", t.lora->r, s.out));
  p.line("(lora_embedding_A): ParameterDict()");
  p.line("(lora_embedding_B): ParameterDict()");
  p.line("(lora_magnitude_vector): ModuleDict()");
  p.close();
}

std::string rms_norm_line(const TreeContext& t) {
  std::string eps = fmt::format("{}", t.config.rms_norm_eps);  // 1e-05, as Python prints it
  return fmt::format("{}RMSNorm(({},), eps={})", t.config.class_prefix(), t.config.hidden_size,
                     eps);
}

void print_layer(Printer& p, const TreeContext& t, int64_t layer, const std::string& label) {
  const std::string prefix = t.config.class_prefix();
  const Adapter::Shape* s = &t.shapes[static_cast<size_t>(layer) * 7];
  p.open(label + prefix + "DecoderLayer(");
  p.open("(self_attn): " + prefix + "Attention(");
  for (int i = 0; i < 4; ++i) print_linear(p, t, s[i]);
  p.close();
  p.open("(mlp): " + prefix + "MLP(");
  for (int i = 4; i < 7; ++i) print_linear(p, t, s[i]);
  p.line("(act_fn): SiLU()");
  p.close();
  p.line("(input_layernorm): " + rms_norm_line(t));
  p.line("(post_attention_layernorm): " + rms_norm_line(t));
  p.close();
}

std::vector<bool> layer_pattern(const TreeContext& t, int64_t layer) {
  std::vector<bool> pattern;
  for (int i = 0; i < 7; ++i)
    pattern.push_back(t.targets.contains(static_cast<int>(layer * 7 + i)));
  return pattern;
}

void print_model(Printer& p, const TreeContext& t, const std::string& label) {
  const LlamaConfig& c = t.config;
  const std::string prefix = c.class_prefix();
  p.open(label + prefix + "ForCausalLM(");
  p.open("(model): " + prefix + "Model(");
  p.line(fmt::format("(embed_tokens): Embedding({}, {})", c.vocab_size, c.hidden_size));
  p.open("(layers): ModuleList(");
  for (int64_t first = 0; first < c.num_hidden_layers;) {
    int64_t last = first;
    while (last + 1 < c.num_hidden_layers && layer_pattern(t, last + 1) == layer_pattern(t, first))
      ++last;
    print_layer(p, t, first,
                first == last ? fmt::format("({}): ", first)
                              : fmt::format("({}-{}): {} x ", first, last, last - first + 1));
    first = last + 1;
  }
  p.close();
  p.line("(norm): " + rms_norm_line(t));
  p.line("(rotary_emb): " + prefix + "RotaryEmbedding()");
  p.close();
  p.line(fmt::format("(lm_head): Linear(in_features={}, out_features={}, bias=False)",
                     c.hidden_size, c.vocab_size));
  p.close();
}

}  // namespace

ModelCount count_parameters(const LlamaConfig& c, const std::optional<LoraSpec>& lora) {
  ModelCount count;
  const std::set<int> targets = adapted(c, lora);
  for (const Adapter::Shape& s : linear_shapes(c)) {
    count.linear += s.in * s.out;
    if (targets.contains(s.index)) count.trainable += lora->r * (s.in + s.out);
  }
  const int64_t embedding = c.vocab_size * c.hidden_size;
  count.other =
      embedding * (c.tie_word_embeddings ? 1 : 2) + (2 * c.num_hidden_layers + 1) * c.hidden_size;
  const int64_t biases = (c.qkv_bias ? c.q_size() + 2 * c.kv_size() : 0) +
                         (c.o_bias ? c.hidden_size : 0) +
                         (c.mlp_bias ? 2 * c.intermediate_size + c.hidden_size : 0);
  count.other += biases * c.num_hidden_layers;
  return count;
}

int64_t hf_footprint(const LlamaConfig& c, const WeightSpec& spec,
                     const std::optional<LoraSpec>& lora) {
  const ModelCount count = count_parameters(c, lora);
  const int64_t lora_bytes =
      lora ? count.trainable * static_cast<int64_t>(size_of(lora->dtype)) : 0;
  switch (spec.format) {
    case WeightFormat::fp32:
      return 4 * (count.linear + count.other) + lora_bytes;
    case WeightFormat::bf16:
    case WeightFormat::fp16:
      return 2 * (count.linear + count.other) + lora_bytes;
    case WeightFormat::int8:
      return count.linear + 2 * count.other + lora_bytes;
    case WeightFormat::nf4:
      break;
  }
  return count.linear / 2 + 2 * count.other + lora_bytes;
}

int64_t resident_bytes(const LlamaConfig& c, const WeightSpec& spec,
                       const std::optional<LoraSpec>& lora) {
  int64_t bytes = hf_footprint(c, spec, lora);
  if (spec.format == WeightFormat::int8)
    for (const Adapter::Shape& s : linear_shapes(c)) bytes += 4 * s.out;
  if (spec.format != WeightFormat::nf4) return bytes;
  for (const Adapter::Shape& s : linear_shapes(c)) {
    const int64_t blocks = (s.in * s.out + spec.block_size - 1) / spec.block_size;
    bytes += spec.double_quant ? blocks + (blocks + nested_block_size - 1) / nested_block_size * 4
                               : blocks * 4;
  }
  return bytes + (spec.double_quant ? 256 * 4 : 0);  // the map is shared
}

std::string module_tree(const LlamaConfig& config, const WeightSpec& spec,
                        const std::optional<LoraSpec>& lora) {
  const TreeContext t{config, spec, lora, adapted(config, lora), linear_shapes(config)};
  Printer p;
  if (!lora) {
    print_model(p, t, "");
    return p.take();
  }
  p.open("PeftModelForCausalLM(");
  p.open("(base_model): LoraModel(");
  print_model(p, t, "(model): ");
  p.close();
  p.close();
  return p.take();
}

std::string with_commas(int64_t value) {
  std::string digits = std::to_string(value);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) digits.insert(i, ",");
  return digits;
}

std::string trainable_line(const ModelCount& count) {
  return fmt::format(
      "trainable params: {} || all params: {} || trainable%: {:.4f}", with_commas(count.trainable),
      with_commas(count.all()),
      100.0 * static_cast<double>(count.trainable) / static_cast<double>(count.all()));
}

}  // namespace qlab
