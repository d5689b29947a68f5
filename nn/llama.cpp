#include "nn/llama.h"

#include "core/ops/copy.h"
#include "core/ops/cross_entropy.h"
#include "core/ops/gemm.h"
#include "core/ops/rms_norm.h"
#include "core/ops/rows.h"

namespace qlab {
namespace {

WeightSpec unquantized(DType compute) {
  return {compute == DType::f32 ? WeightFormat::fp32 : WeightFormat::bf16};
}

Tensor to_dtype(const Tensor& t, DType dtype, Device device) {
  const MemoryTag tag(Category::weights);
  if (t.device().is_meta()) return Tensor::empty(t.shape(), dtype, device);
  return cast(t, dtype).to(device);
}

/// a | b in one tensor.
Variable side_by_side(Tape& tape, const Variable& a, const Variable& b) {
  const int64_t rows = a.value.dim(0), left = a.value.dim(1), cols = left + b.value.dim(1);
  const Tensor merged = Tensor::empty({rows, cols}, a.value.dtype(), a.value.device());
  copy(merged.slice_cols(0, left), a.value);
  copy(merged.slice_cols(left, cols), b.value);
  return tape.record(
      "side_by_side", merged, {a, b}, {}, [left, cols](const Tensor& g, const Node&) {
        return std::vector<Tensor>{g.slice_cols(0, left).clone(), g.slice_cols(left, cols).clone()};
      });
}

}  // namespace

Llama::Llama(const LlamaConfig& config, const WeightSpec& spec, DType compute, Device device,
             const TensorSource& source)
    : config_(config), spec_(spec), compute_(compute), device_(device) {
  const int64_t hidden = config.hidden_size, inter = config.intermediate_size;
  embed_tokens_ =
      to_dtype(source("model.embed_tokens.weight", {config.vocab_size, hidden}), compute, device);
  int index = 0;
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string prefix = fmt::format("model.layers.{}.", l);
    DecoderLayer& layer = layers_.emplace_back();
    const auto norm = [&](const char* name) {
      return to_dtype(source(prefix + name + ".weight", {hidden}), DType::f32, device);
    };
    const auto linear = [&](const char* name, int64_t out, int64_t in, bool bias) {
      Linear module;
      module.index = index++;
      module.name = prefix + name;
      Tensor w = source(module.name + ".weight", {out, in});
      {
        const MemoryTag tag(Category::workspace);
        w = w.device().is_meta() ? Tensor::empty(w.shape(), w.dtype(), device) : w.to(device);
      }
      module.weight = Weight::from_dense(w, spec);
      if (bias) module.bias = to_dtype(source(module.name + ".bias", {out}), DType::f32, device);
      synchronize(device);
      return module;
    };
    layer.input_layernorm = norm("input_layernorm");
    layer.q_proj = linear("self_attn.q_proj", config.q_size(), hidden, config.qkv_bias);
    layer.k_proj = linear("self_attn.k_proj", config.kv_size(), hidden, config.qkv_bias);
    layer.v_proj = linear("self_attn.v_proj", config.kv_size(), hidden, config.qkv_bias);
    layer.o_proj = linear("self_attn.o_proj", hidden, config.q_size(), config.o_bias);
    layer.post_attention_layernorm = norm("post_attention_layernorm");
    layer.gate_proj = linear("mlp.gate_proj", inter, hidden, config.mlp_bias);
    layer.up_proj = linear("mlp.up_proj", inter, hidden, config.mlp_bias);
    layer.down_proj = linear("mlp.down_proj", hidden, inter, config.mlp_bias);
  }
  norm_ = to_dtype(source("model.norm.weight", {hidden}), DType::f32, device);
  const Tensor head =
      config.tie_word_embeddings
          ? embed_tokens_
          : to_dtype(source("lm_head.weight", {config.vocab_size, hidden}), compute, device);
  lm_head_ = Weight::share(head, unquantized(compute).format);
  const MemoryTag tag(Category::constants);
  rope_ = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta,
                      config.rope_scaling, config.rope_divisors, device);
  synchronize(device);
}

const std::vector<const Linear*> Llama::linears() const {
  std::vector<const Linear*> all;
  for (const DecoderLayer& l : layers_)
    for (const Linear* module :
         {&l.q_proj, &l.k_proj, &l.v_proj, &l.o_proj, &l.gate_proj, &l.up_proj, &l.down_proj})
      all.push_back(module);
  return all;
}

std::vector<std::string> Llama::linear_names() const {
  std::vector<std::string> names;
  for (const Linear* module : linears()) names.push_back(module->name);
  return names;
}

std::vector<Adapter::Shape> Llama::adapter_shapes(const LoraSpec& spec) const {
  const std::vector<const Linear*> all = linears();
  std::vector<Adapter::Shape> shapes;
  for (const int i : resolve_targets(spec, linear_names()))
    shapes.push_back(
        {i, all[i]->name, all[i]->weight.in_features(), all[i]->weight.out_features()});
  return shapes;
}

Variable Llama::layer(Tape& tape, const DecoderLayer& layer, int64_t index, const Variable& x,
                      const Batch& batch, KvCache* cache) const {
  const float eps = static_cast<float>(config_.rms_norm_eps);
  AttentionShape shape{config_.num_attention_heads, config_.num_key_value_heads, config_.head_dim,
                       batch.max_length, batch.max_length};
  const Variable normed = rms_norm(tape, x, layer.input_layernorm, eps);
  const Variable q = rope(tape, linear(tape, normed, layer.q_proj, batch), config_.q_size(),
                          batch.positions, rope_, config_.head_dim);
  Variable k = rope(tape, linear(tape, normed, layer.k_proj, batch), config_.kv_size(),
                    batch.positions, rope_, config_.head_dim);
  Variable v = linear(tape, normed, layer.v_proj, batch);
  Tensor cu_k = batch.cu_seqlens;
  if (cache != nullptr) {
    const int64_t end = cache->length + k.value.dim(0);
    copy(cache->k[index].slice_rows(cache->length, end), k.value);
    copy(cache->v[index].slice_rows(cache->length, end), v.value);
    k.value = cache->k[index].slice_rows(0, end);
    v.value = cache->v[index].slice_rows(0, end);
    cu_k = Tensor::from_vector<int32_t>({0, static_cast<int32_t>(end)}, {2}, batch.ids.device());
    shape.max_k = end;
  }
  const Variable mixed = attention(tape, q, k, v, batch.cu_seqlens, cu_k, shape);
  const Variable h = add(tape, x, linear(tape, mixed, layer.o_proj, batch));
  const Variable normed2 = rms_norm(tape, h, layer.post_attention_layernorm, eps);
  const Variable activated =
      swiglu(tape, side_by_side(tape, linear(tape, normed2, layer.gate_proj, batch),
                                linear(tape, normed2, layer.up_proj, batch)));
  return add(tape, h, linear(tape, activated, layer.down_proj, batch));
}

Variable Llama::hidden(Tape& tape, const Batch& batch, bool recompute, KvCache* cache) const {
  Variable x = tape.input(gather_rows(embed_tokens_, batch.ids, compute_));
  for (size_t l = 0; l < layers_.size(); ++l) {
    const auto forward = [this, &tape, &batch, l, cache](const Variable& in) {
      return layer(tape, layers_[l], static_cast<int64_t>(l), in, batch, cache);
    };
    x = recompute ? tape.recompute(forward, x) : forward(x);
  }
  if (cache != nullptr) cache->length += batch.ids.numel();
  return x;
}

Variable Llama::loss(Tape& tape, const Batch& batch, const Variable& hidden) const {
  const Variable rows = gather_rows(tape, hidden, batch.loss_rows);
  const Variable normed = rms_norm(tape, rows, norm_, static_cast<float>(config_.rms_norm_eps));
  const int64_t count = normed.value.dim(0);
  const Device device = normed.value.device();
  const bool trains = normed.requires_grad();
  const Tensor head = lm_head_.dense(compute_, device);
  const Tensor nll = Tensor::empty({count}, DType::f32, device);
  const Tensor dh = trains ? Tensor::empty(normed.value.shape(), compute_, device) : Tensor();
  for (int64_t begin = 0; begin < count; begin += loss_chunk) {
    const int64_t end = std::min(begin + loss_chunk, count);
    const MemoryTag tag(Category::workspace);
    const Tensor z = matmul_nt(normed.value.slice_rows(begin, end), head);
    cross_entropy_inplace(nll.slice_rows(begin, end), z, batch.labels.slice_rows(begin, end),
                          trains ? batch.scale.slice_rows(begin, end) : Tensor());
    if (trains) gemm(dh.slice_rows(begin, end), z, Op::none, head, Op::none);
  }
  return tape.record("linear_cross_entropy", nll, {normed}, {{"linear_cross_entropy.dh", dh}},
                     [](const Tensor&, const Node& node) {
                       return std::vector<Tensor>{node.saved("linear_cross_entropy.dh")};
                     });
}

Tensor Llama::logits(const Tensor& hidden) const {
  const Tensor normed = rms_norm(hidden, norm_, static_cast<float>(config_.rms_norm_eps)).y;
  return matmul_nt(normed, lm_head_.dense(compute_, hidden.device()));
}

KvCache Llama::make_cache(int64_t capacity) const {
  KvCache cache;
  cache.capacity = capacity;
  for (size_t l = 0; l < layers_.size(); ++l) {
    cache.k.push_back(Tensor::empty({capacity, config_.kv_size()}, compute_, device_));
    cache.v.push_back(Tensor::empty({capacity, config_.kv_size()}, compute_, device_));
  }
  return cache;
}

}  // namespace qlab
