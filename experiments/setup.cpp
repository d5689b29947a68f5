#include "experiments/setup.h"

#include <cmath>
#include <limits>

namespace qlab {
namespace {

void check_vocabulary(const Dataset& data, const std::string& path, int64_t vocab_size) {
  for (const Example& example : data.examples)
    for (size_t i = 0; i < example.input_ids.size(); ++i) {
      const int32_t id = example.input_ids[i], label = example.labels[i];
      const auto outside = [&](int32_t token) { return token < 0 || token >= vocab_size; };
      if (outside(id) || (label != not_trained && outside(label)))
        fail("{}: token {} is outside the model's vocabulary of {}", path, outside(id) ? id : label,
             vocab_size);
    }
}

}  // namespace

WeightSpec weight_spec(const Config& config) {
  WeightSpec spec;
  for (const WeightFormat format : {WeightFormat::nf4, WeightFormat::int8, WeightFormat::bf16,
                                    WeightFormat::fp16, WeightFormat::fp32})
    if (config.quant.type == name_of(format)) spec.format = format;
  spec.block_size = config.quant.block_size;
  spec.double_quant = config.quant.double_quant;
  return spec;
}

LoraSpec lora_spec(const Config& config) {
  LoraSpec spec;
  spec.r = config.lora.r;
  spec.alpha = config.lora.alpha.value_or(2.0 * static_cast<double>(spec.r));
  spec.dropout = config.lora.dropout;
  spec.rslora = config.lora.scaling == "alpha/sqrt(r)";
  spec.dtype = dtype_from_name(config.lora.dtype);
  spec.pattern = config.lora.targets.pattern;
  spec.names = config.lora.targets.names;
  return spec;
}

AdamWConfig adamw_config(const Config& config) {
  return {static_cast<float>(config.optim.betas[0]),
          static_cast<float>(config.optim.betas[1]),
          static_cast<float>(config.optim.eps),
          static_cast<float>(config.optim.weight_decay),
          static_cast<float>(config.optim.max_grad_norm),
          config.optim.type.ends_with("8bit"),
          is_paged(config)};
}

bool is_paged(const Config& config) { return config.optim.type.starts_with("paged_"); }

Recompute recompute_of(const Config& config) {
  if (config.train.recompute == "selective") return Recompute::selective;
  if (config.train.recompute == "offload") return Recompute::offload;
  return config.train.recompute == "full" ? Recompute::full : Recompute::none;
}

int64_t streamed_layers(const Config& config, int64_t layers) {
  const std::string& wish = config.model.streamed_layers.text;
  if (wish == "auto") return 0;
  if (wish == "all") return layers;
  const int64_t count = std::stoll(wish);
  if (count > layers)
    fail("model.streamed_layers: {} of the {} layers of {}", count, layers, config.model.path);
  return count;
}

int64_t most_positions(const std::string& path, const LlamaConfig& config) {
  return path.starts_with("synthetic:") ? std::numeric_limits<int64_t>::max()
                                        : config.max_position_embeddings;
}

DType compute_dtype(const Config& config, Device device) {
  const bool bf16 = supports_bf16(device);
  if (config.quant.compute_dtype == "auto") {
    if (device.target == DeviceType::cpu) return DType::f32;
    return bf16 ? DType::bf16 : DType::f16;
  }
  const DType asked = dtype_from_name(config.quant.compute_dtype);
  if (asked == DType::bf16 && !bf16)
    fail(
        "quant.compute_dtype: bf16 needs compute capability 8.0 or newer, and {} is older: set "
        "fp16 or auto",
        device_description(device));
  return asked;
}

std::string compute_dtype_word(DType compute) {
  return compute == DType::f32 ? "fp32" : compute == DType::bf16 ? "bf16" : "fp16";
}

int64_t examples_to_train(const TrainConfig& config, const Dataset& data) {
  if (config.steps) return *config.steps * config.batch_size * config.grad_accum;
  const double epochs = config.epochs.value_or(1);
  const auto examples = static_cast<double>(data.examples.size());
  const int64_t count = std::llround(epochs * examples);
  if (count == 0) fail("train.epochs: {} of {} examples is not even one", epochs, examples);
  return count;
}

int64_t evaluations_left(int64_t step, int64_t total_steps, int64_t every) {
  if (step >= total_steps) return 0;
  return 1 + (every > 0 ? (total_steps - 1) / every - (step - 1) / every : 0);
}

const ModelSource& Library::model(const std::string& path) {
  check_stop();
  auto it = models_.find(path);
  if (it == models_.end())
    it = models_.emplace(path, shapes_ ? open_shapes(path) : open_model(path)).first;
  return it->second;
}

const std::string& Library::fingerprint(const std::string& path) {
  auto it = fingerprints_.find(path);
  if (it == fingerprints_.end())
    it = fingerprints_.emplace(path, model(path).fingerprint([this] { check_stop(); })).first;
  return it->second;
}

const Tokenizer& Library::tokenizer(const std::string& model_path) {
  auto it = tokenizers_.find(model_path);
  if (it == tokenizers_.end())
    it = tokenizers_
             .emplace(model_path, model_path.starts_with("synthetic:")
                                      ? Tokenizer::without_text(model(model_path).config.vocab_size)
                                      : Tokenizer::load(model_path))
             .first;
  return it->second;
}

const Dataset& Library::train_set(const Config& config) {
  return dataset(config, config.data.train, config.data.seq_len, synthetic_train);
}
const Dataset& Library::eval_set(const Config& config) {
  return dataset(config, config.data.eval, config.data.eval_seq_len, synthetic_eval);
}

const Dataset& Library::dataset(const Config& config, const std::string& path, int64_t seq_len,
                                const SyntheticSet& synthetic) {
  const LlamaConfig& llama = model(config.model.path).config;
  if (const int64_t most = most_positions(config.model.path, llama); seq_len > most)
    fail("a sequence length of {} exceeds the {} positions of {}", seq_len, most,
         config.model.path);
  const bool random = path == "synthetic";
  const std::string key = fmt::format("{}|{}|{}|{}|{}|{}", config.model.path, path, seq_len,
                                      config.data.completion_only, config.data.chat_template,
                                      random ? synthetic.seed : 0);
  auto it = datasets_.find(key);
  if (it != datasets_.end()) return it->second;
  Dataset data;
  if (random) {
    data = synthetic_dataset(synthetic.examples, seq_len, llama.vocab_size, synthetic.seed);
  } else {
    data = load_dataset(path, tokenizer(config.model.path),
                        {seq_len, config.data.completion_only, config.data.chat_template,
                         [this] { check_stop(); }});
    check_vocabulary(data, path, llama.vocab_size);
  }
  return datasets_.emplace(key, std::move(data)).first->second;
}

std::string base_key(const Config& config, DType compute, Device device) {
  return fmt::format("{}|{}|{}|{}|{}|{}|{}|{}", config.model.path, config.model.embeddings,
                     config.model.streamed_layers.text, config.quant.type, config.quant.block_size,
                     config.quant.double_quant, name_of(compute), device.str());
}

void Library::drop_base() {
  base_.reset();
  base_evaluations_.clear();
}

Llama& Library::base(const Config& config, DType compute, Device device) {
  const std::string key = base_key(config, compute, device);
  if (base_ == nullptr || base_key_ != key) {
    drop_base();
    ModelSource source = model(config.model.path);
    memory_ = std::make_unique<MemoryLog>(device);
    source.read = [this, read = source.read](const std::string& name, const Shape& shape) {
      check_stop();
      memory_->look();
      return read(name, shape);
    };
    base_ =
        load_llama(source, weight_spec(config), compute, device, config.model.embeddings == "host",
                   streamed_layers(config, source.config.num_hidden_layers));
    base_key_ = key;
  }
  base_->hold_resident(0, Batch());
  base_->forget_positions();
  memory_->use_base();
  return *base_;
}

}  // namespace qlab
