#include "nn/load.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "core/arena.h"
#include "core/parallel.h"
#include "core/random.h"
#include "data/checkpoint.h"

namespace qlab {
namespace {

constexpr const char* synthetic_prefix = "synthetic:";
constexpr double synthetic_std = 0.02;

// The normal distribution by 65,536 equally likely values, its quantiles at (k + 1/2) / 65,536.
std::vector<bf16> synthetic_values() {
  constexpr size_t count = 65536, half = count / 2;
  std::vector<bf16> values(count);
  double x = 0;
  for (size_t k = 0; k < half; ++k) {
    // Newton's method from the quantile below: the distribution is concave there, so that x rises.
    const double above = (static_cast<double>(half - k) - 0.5) / static_cast<double>(count);
    for (double step = 1; step > 1e-9;) {
      const double density = std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
      step = (0.5 * std::erfc(x / std::numbers::sqrt2) - above) / density;
      x += step;
    }
    values[half + k] = bf16(static_cast<float>(x * synthetic_std));
    values[half - 1 - k] = bf16(static_cast<float>(-x * synthetic_std));
  }
  return values;
}

// Norms are ones, biases zeros; everything else normal, element by element from its own counter: 16
// bits choose the value, so that a model of 8 billion weights is made in seconds.
Tensor synthetic_tensor(const std::string& name, const Shape& shape) {
  static const std::vector<bf16> quantiles = synthetic_values();
  const bf16* values = quantiles.data();
  const MemoryTag tag(Category::workspace);
  Tensor t = Tensor::empty(shape, DType::bf16, Device::cpu());
  bf16* out = t.data<bf16>();
  const int64_t count = t.numel();
  const bool norm = name.ends_with("norm.weight");
  if (norm || name.ends_with(".bias")) {
    std::fill(out, out + count, bf16(norm ? 1.0f : 0.0f));
    return t;
  }
  const uint64_t key = stream_key(0, name);
  constexpr int64_t at_once = 8;
  parallel_for((count + at_once - 1) / at_once, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Philox random =
          philox(key, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0, 0);
      bf16 drawn[at_once];
      for (int64_t j = 0; j < at_once; ++j)
        drawn[j] = values[random.lane[j / 2] >> (16 * (j % 2)) & 0xffff];
      std::copy_n(drawn, std::min(at_once, count - at_once * i), out + at_once * i);
    }
  });
  return t;
}

bool on_4bit_grid(const std::string& dtype) {
  return dtype.starts_with("Q4_") || dtype.starts_with("Q5_");
}

Tensor tensor_on_paper(const Shape& shape, DType dtype) {
  const MemoryTag tag(Category::workspace);
  return Tensor::empty(shape, dtype, Device::cpu().meta());
}

// What files hold besides the weights: tables that follow from the configuration, and a copy of
// tied embeddings.
bool is_redundant(const std::string& name, const LlamaConfig& config) {
  return name.ends_with("rotary_emb.inv_freq") ||
         (name == "lm_head.weight" && config.tie_word_embeddings);
}

// Every tensor of the model, and that there are no others, by the headers alone: mistakes surface
// before anything is loaded.
void check_tensors(const LlamaConfig& config, const Checkpoint& checkpoint) {
  std::set<std::string> wanted;
  Llama(config, {WeightFormat::bf16}, DType::bf16, Device::cpu().meta(),
        [&](const std::string& name, const Shape& shape) {
          checkpoint.check(name, shape);
          wanted.insert(name);
          return tensor_on_paper(shape, DType::bf16);
        });
  std::vector<std::string> left;
  for (const std::string& name : checkpoint.names())
    if (!wanted.contains(name) && !is_redundant(name, config)) left.push_back(name);
  if (!left.empty())
    fail(
        "{}: the model that the configuration describes ({} layers) has no place for tensor "
        "\"{}\"{}; config.json and the weights must be of one model that qlab computes in full",
        checkpoint.file_of(left.front()), config.num_hidden_layers, left.front(),
        left.size() > 1 ? fmt::format(" and {} more", left.size() - 1) : "");
}

}  // namespace

ModelSource open_model(const std::string& path) {
  if (path.empty())
    fail("model.path is empty; give a directory, a .gguf file, a hub id or synthetic:NAME");
  ModelSource source;
  source.path = path;
  if (path.starts_with(synthetic_prefix)) {
    source.config = synthetic_config(path.substr(std::string(synthetic_prefix).size()));
    source.fingerprint = [path](const auto&) { return path + " by quantiles"; };  // how it is made
    source.read = synthetic_tensor;
    source.on_paper = [](const std::string&, const Shape& shape) {
      return tensor_on_paper(shape, DType::bf16);
    };
    return source;
  }
  std::shared_ptr<Checkpoint> checkpoint = Checkpoint::open(path);
  source.config = llama_config_from_json(checkpoint->config(), checkpoint->path());
  source.config.rope_divisors = checkpoint->rope_divisors();
  // A checkpoint without lm_head.weight is tied, whatever its configuration says.
  if (!checkpoint->contains("lm_head.weight")) source.config.tie_word_embeddings = true;
  check_tensors(source.config, *checkpoint);
  source.config.source_dtype = checkpoint->source_dtype("model.layers.0.self_attn.q_proj.weight");
  source.fingerprint = [checkpoint](const std::function<void()>& between_tensors) {
    return checkpoint->fingerprint(between_tensors);
  };
  const auto dtype = [checkpoint](const std::string& name) {
    return checkpoint->source_dtype(name) == "BF16" ? DType::bf16 : DType::f32;
  };
  source.read = [checkpoint, dtype](const std::string& name, const Shape& shape) {
    const MemoryTag tag(Category::workspace);
    return checkpoint->read(name, shape, dtype(name));
  };
  source.on_paper = [dtype](const std::string& name, const Shape& shape) {
    return tensor_on_paper(shape, dtype(name));
  };
  return source;
}

ModelSource open_shapes(const std::string& path) {
  if (path.empty() || path.starts_with(synthetic_prefix)) return open_model(path);
  const auto config = configuration_alone(path);
  if (!config) return open_model(path);
  ModelSource source;
  source.path = path;
  source.config = llama_config_from_json(*config, path);
  source.shapes_alone = true;
  const DType dtype =
      config->value("torch_dtype", nlohmann::json()) == "bfloat16" ? DType::bf16 : DType::f32;
  source.on_paper = [dtype](const std::string&, const Shape& shape) {
    return tensor_on_paper(shape, dtype);
  };
  source.read = [path](const std::string& name, const Shape&) -> Tensor {
    fail("{}: \"{}\" cannot be read: there is config.json and no weights", path, name);
  };
  source.fingerprint = [path](const auto&) -> std::string {
    fail("{}: there is config.json and no weights", path);
  };
  return source;
}

std::unique_ptr<Llama> load_llama(const ModelSource& source, const WeightSpec& spec, DType compute,
                                  Device device, bool host_embeddings, int64_t streamed_layers) {
  int64_t bytes = 0;
  if (!device.is_meta() &&
      streamed_layers == 0) {  // a layer that moves to the host frees its memory
    const Arena on_paper(device.meta());
    Llama(source.config, spec, compute, device.meta(), source.on_paper, host_embeddings);
    bytes = on_paper.taken();
  }
  const Arena arena(device, bytes);
  return std::make_unique<Llama>(source.config, spec, compute, device,
                                 device.is_meta() ? source.on_paper : source.read, host_embeddings,
                                 streamed_layers);
}

std::string requantization_warning(const ModelSource& source, const WeightSpec& spec) {
  if (spec.format != WeightFormat::nf4 || !on_4bit_grid(source.config.source_dtype)) return "";
  return fmt::format(
      "{}: its weights are stored as {}, already on a coarse grid; quantizing them to {} measures "
      "both errors together. For an ablation over quantization start from a 16-bit checkpoint.",
      source.path, source.config.source_dtype, name_of(spec.format));
}

}  // namespace qlab
