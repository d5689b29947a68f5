#include "nn/load.h"

#include <nlohmann/json.hpp>

#include "core/parallel.h"
#include "core/random.h"
#include "data/checkpoint.h"

namespace qlab {
namespace {

constexpr const char* synthetic_prefix = "synthetic:";
constexpr double synthetic_std = 0.02;

// Norms are ones, biases zeros; everything else normal, element by element from its own counter.
Tensor synthetic_tensor(const std::string& name, const Shape& shape) {
  const bool norm = name.ends_with("norm.weight"), bias = name.ends_with(".bias");
  const MemoryTag tag(Category::workspace);
  Tensor t = Tensor::empty(shape, DType::bf16, Device::cpu());
  bf16* out = t.data<bf16>();
  const uint64_t key = stream_key(0, name);
  const int64_t pairs = (t.numel() + 1) / 2;
  parallel_for(pairs, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double n[2] = {norm ? 1.0 : 0.0, norm ? 1.0 : 0.0};
      if (!norm && !bias) {
        const Philox random =
            philox(key, static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0, 0);
        normal_pair(random.lane[0], random.lane[1], n[0], n[1]);
        n[0] *= synthetic_std, n[1] *= synthetic_std;
      }
      for (int j = 0; j < 2 && 2 * i + j < t.numel(); ++j)
        out[2 * i + j] = bf16(static_cast<float>(n[j]));
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

// Every tensor of the model, by the headers alone: mistakes surface before anything is loaded.
void check_tensors(const LlamaConfig& config, const Checkpoint& checkpoint) {
  Llama(config, {WeightFormat::bf16}, DType::bf16, Device::cpu().meta(),
        [&](const std::string& name, const Shape& shape) {
          checkpoint.check(name, shape);
          return tensor_on_paper(shape, DType::bf16);
        });
}

}  // namespace

ModelSource open_model(const std::string& path) {
  if (path.empty())
    fail("model.path is empty; give a directory, a .gguf file, a hub id or synthetic:NAME");
  ModelSource source;
  source.path = path;
  if (path.starts_with(synthetic_prefix)) {
    source.config = synthetic_config(path.substr(std::string(synthetic_prefix).size()));
    source.fingerprint = path;
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
  source.fingerprint = checkpoint->fingerprint();
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

std::unique_ptr<Llama> load_llama(const ModelSource& source, const WeightSpec& spec, DType compute,
                                  Device device, bool host_embeddings, int64_t streamed_layers) {
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
