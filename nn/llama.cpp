#include "nn/llama.h"

#include <algorithm>

#include "core/ops/copy.h"
#include "core/ops/cross_entropy.h"
#include "core/ops/gemm.h"
#include "core/ops/rms_norm.h"
#include "core/ops/rows.h"

namespace qlab {
namespace {

WeightFormat unquantized(DType compute) {
  if (compute == DType::f32) return WeightFormat::fp32;
  return compute == DType::bf16 ? WeightFormat::bf16 : WeightFormat::fp16;
}

Tensor to_dtype(const Tensor& t, DType dtype, Device device) {
  const MemoryTag tag(Category::weights);
  const Tensor weight = cast(t, dtype).to(device);
  weight.storage()->set_category(Category::weights);  // it may be what was read
  return weight;
}

}  // namespace

Llama::Llama(const LlamaConfig& config, const WeightSpec& spec, DType compute, Device device,
             const TensorSource& source, bool host_embeddings, int64_t streamed_layers)
    : config_(config),
      spec_(spec),
      compute_(compute),
      device_(device),
      host_embeddings_(host_embeddings) {
  if (host_embeddings && config.tie_word_embeddings)
    fail(
        "model.embeddings: host: lm_head of this model is the same matrix and stays on the device");
  const int64_t hidden = config.hidden_size, inter = config.intermediate_size;
  const auto dense_on = [&](Device where, const std::string& name, const Shape& shape,
                            DType dtype) {
    const MemoryName scope(name);
    return to_dtype(source(name, shape), dtype, where);
  };
  const auto dense = [&](const std::string& name, const Shape& shape, DType dtype) {
    return dense_on(device, name, shape, dtype);
  };
  const Device host = device.is_meta() ? Device::cpu().meta() : Device::cpu();
  embed_tokens_ = dense_on(host_embeddings ? host : device, "model.embed_tokens.weight",
                           {config.vocab_size, hidden}, compute);
  QLAB_CHECK(streamed_layers >= 0 && streamed_layers <= config.num_hidden_layers,
             "{} of {} layers cannot be streamed", streamed_layers, config.num_hidden_layers);
  if (streamed_layers > 0) stream_ = std::make_unique<LayerStream>(device);
  int index = 0;
  for (int64_t l = 0; l < config.num_hidden_layers; ++l) {
    const std::string prefix = fmt::format("model.layers.{}.", l);
    DecoderLayer& layer = layers_.emplace_back();
    const auto norm = [&](const char* name) {
      return dense(prefix + name + ".weight", {hidden}, DType::f32);
    };
    const auto linear = [&](const char* name, int64_t out, int64_t in, bool bias) {
      Linear module;
      module.index = index++;
      module.name = prefix + name;
      const MemoryName scope(module.name);
      Tensor w = source(module.name + ".weight", {out, in});
      {
        const MemoryTag tag(Category::workspace);
        w = w.to(device);
      }
      module.weight = Weight::from_dense(w, spec);
      w = Tensor();
      if (bias) module.bias = dense(module.name + ".bias", {out}, DType::f32);
      synchronize(device);
      return module;
    };
    layer.input_layernorm = norm("input_layernorm");
    layer.qkv_proj.members = {
        linear("self_attn.q_proj", config.q_size(), hidden, config.qkv_bias),
        linear("self_attn.k_proj", config.kv_size(), hidden, config.qkv_bias),
        linear("self_attn.v_proj", config.kv_size(), hidden, config.qkv_bias)};
    layer.o_proj.members = {linear("self_attn.o_proj", hidden, config.q_size(), config.o_bias)};
    layer.post_attention_layernorm = norm("post_attention_layernorm");
    layer.gate_up_proj.members = {linear("mlp.gate_proj", inter, hidden, config.mlp_bias),
                                  linear("mlp.up_proj", inter, hidden, config.mlp_bias)};
    layer.down_proj.members = {linear("mlp.down_proj", hidden, inter, config.mlp_bias)};
    if (LayerStream::is_streamed(l, streamed_layers, config.num_hidden_layers)) move_to_host(layer);
  }
  set_folded(device.target == DeviceType::cuda && compute != DType::f32 &&
             spec.format == WeightFormat::nf4);
  norm_ = dense("model.norm.weight", {hidden}, DType::f32);
  const Tensor head = config.tie_word_embeddings
                          ? embed_tokens_
                          : dense("lm_head.weight", {config.vocab_size, hidden}, compute);
  lm_head_ = Weight::share(head, unquantized(compute));
  synchronize(device);
}

void Llama::move_to_host(DecoderLayer& layer) {
  std::vector<Tensor*> parts;
  const auto groups = {&layer.qkv_proj, &layer.o_proj, &layer.gate_up_proj, &layer.down_proj};
  for (LinearGroup* group : groups)
    for (Linear& module : group->members)
      for (Tensor* part : module.weight.parts()) parts.push_back(part);
  const size_t number = stream_->add(parts);
  for (LinearGroup* group : groups) group->stream = stream_.get(), group->streamed = number;
}

const std::vector<const Linear*> Llama::linears() const {
  std::vector<const Linear*> all;
  for (const DecoderLayer& l : layers_)
    for (const LinearGroup* group : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj})
      for (const Linear& module : group->members) all.push_back(&module);
  return all;
}

void Llama::cover_positions(int64_t positions) const {
  if (rope_.cos.defined() && rope_.cos.dim(0) >= positions) return;
  rope_ = {};
  ++rope_generation_;
  const MemoryTag tag(Category::constants);
  const MemoryName scope("rotary_emb");
  rope_ = rope_tables(positions, config_.head_dim, config_.rope_theta, config_.rope_scaling,
                      config_.rope_divisors, device_);
  synchronize(device_);
}

DType Llama::adapter_dtype(const LoraSpec& spec) const {
  return folded_ && spec.dropout == 0 ? DType::f32 : compute_;
}

void Llama::set_folded(bool folded) {
  folded_ = folded;
  for (DecoderLayer& l : layers_)
    for (LinearGroup* group : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj})
      group->folded = folded;
}

bool Llama::hold_resident(int64_t budget, const Batch& batch) {
  bool changed = false;
  for (DecoderLayer& l : layers_)
    for (LinearGroup* group : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj}) {
      const int64_t width = group->tail(batch), n = group->out_features() + width;
      const int64_t k = group->in_features();
      Tensor& held = group->resident;
      const int64_t pitch = width > 0 ? (k + width + 63) / 64 * 64 : k;
      const int64_t bytes = n * pitch * static_cast<int64_t>(size_of(compute_));
      const bool fits = group->folded && group->stream == nullptr && bytes <= budget;
      if (fits) budget -= bytes;
      if (fits == held.defined() && (!fits || held.shape() == Shape{n, k + width})) continue;
      changed = true;
      held = Tensor();
      if (!fits) continue;
      const MemoryTag tag(Category::weights);
      const MemoryName name("held expanded");
      held = Tensor::with_tail(n, k, width, compute_, device_).widened(k + width);
      int64_t row = 0;
      for (const Linear& member : group->members) {
        const int64_t end = row + member.weight.out_features();
        member.weight.expand(held.slice_rows(row, end).slice_cols(0, k));
        row = end;
      }
    }
  return changed;
}

int64_t Llama::resident_bytes() const {
  int64_t bytes = 0;
  for (const DecoderLayer& l : layers_)
    for (const LinearGroup* group : {&l.qkv_proj, &l.o_proj, &l.gate_up_proj, &l.down_proj})
      if (const Tensor& held = group->resident; held.defined())
        bytes += held.dim(0) * held.pitch() * static_cast<int64_t>(size_of(held.dtype()));
  return bytes;
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
                      const Batch& batch, Recompute recompute, KvCache* cache) const {
  const float eps = static_cast<float>(config_.rms_norm_eps);
  const int64_t q_size = config_.q_size(), kv_size = config_.kv_size();
  const bool selective = recompute == Recompute::selective;
  // By value what ends with this call: a region runs it again later.
  const auto projected = [&tape, &batch, &layer, eps](const Variable& in) {
    return linear(tape, rms_norm(tape, in, layer.input_layernorm, eps, layer.qkv_proj.tail(batch)),
                  layer.qkv_proj, batch);
  };
  const Variable qkv = rope(tape, selective ? tape.recompute(projected, x) : projected(x),
                            q_size + kv_size, batch.positions, rope_, config_.head_dim);
  AttentionShape shape{config_.num_attention_heads, config_.num_key_value_heads, config_.head_dim,
                       batch.max_length, batch.max_length};
  Variable mixed;
  if (cache == nullptr) {
    mixed = attention(tape, qkv, batch.cu_seqlens, shape, layer.o_proj.tail(batch));
  } else {
    const int64_t end = cache->length + qkv.value.dim(0);
    const Tensor k = qkv.value.slice_cols(q_size, q_size + kv_size);
    const Tensor v = qkv.value.slice_cols(q_size + kv_size, q_size + 2 * kv_size);
    copy(cache->k[index].slice_rows(cache->length, end), k);
    copy(cache->v[index].slice_rows(cache->length, end), v);
    shape.max_k = end;
    const Tensor cu_k =
        Tensor::from_vector<int32_t>({0, static_cast<int32_t>(end)}, {2}, batch.ids.device());
    mixed.value = attention(qkv.value.slice_cols(0, q_size), cache->k[index].slice_rows(0, end),
                            cache->v[index].slice_rows(0, end), batch.cu_seqlens, cu_k, shape)
                      .o;
  }
  const Variable h = linear(tape, mixed, layer.o_proj, batch, x);
  if (recompute >= Recompute::full && x.value.dim(0) > row_unit)
    return mlp_in_chunks(tape, layer, h, batch);
  return mlp(tape, layer, h, batch, selective, true);
}

// `wanted`: whether somebody reads the result, or its gradients alone are of interest.
Variable Llama::mlp(Tape& tape, const DecoderLayer& layer, const Variable& h, const Batch& batch,
                    bool selective, bool wanted) const {
  const float eps = static_cast<float>(config_.rms_norm_eps);
  const auto again = [&](const Variable& in, const std::function<Variable(const Variable&)>& part) {
    return selective ? tape.recompute(part, in) : part(in);
  };
  const Variable gate_up = again(h, [&tape, &batch, &layer, eps](const Variable& in) {
    const int64_t tail = layer.gate_up_proj.tail(batch);
    return linear(tape, rms_norm(tape, in, layer.post_attention_layernorm, eps, tail),
                  layer.gate_up_proj, batch);
  });
  return again(gate_up, [&tape, &batch, &layer, h, wanted](const Variable& in) {
    if (!wanted && !layer.down_proj.trains(batch)) tape.leave_next_result();
    const Variable activated = swiglu(tape, in, layer.down_proj.tail(batch));
    if (!wanted) tape.leave_next_result();
    return linear(tape, activated, layer.down_proj, batch, h);
  });
}

// Each chunk runs on a tape of its own, forward without a record; backward computes it again. What
// an MLP holds, 10 times as wide as the residual stream in Llama-3.1-8B, exists for a chunk alone.
Variable Llama::mlp_in_chunks(Tape& tape, const DecoderLayer& layer, const Variable& h,
                              const Batch& batch) const {
  const std::vector<RowChunk> chunks = row_chunks(batch);
  const Tensor y = Tensor::empty(h.value.shape(), h.value.dtype(), h.value.device());
  const bool trains = layer.gate_up_proj.trains(batch) || layer.down_proj.trains(batch);
  if (!(h.requires_grad() || trains) || tape.result_wanted())
    for (const RowChunk& chunk : chunks) {
      Tape own(false);
      const Variable in{h.value.slice_rows(chunk.begin, chunk.end), -1, h.tail};
      copy(y.slice_rows(chunk.begin, chunk.end),
           mlp(own, layer, in, rows_of(batch, chunk), false, true).value);
    }
  const auto backward = [this, &layer, &batch, chunks, tail = h.tail](const Tensor& g,
                                                                      const Node& node) {
    const Tensor& input = node.saved("mlp.h");
    const bool wanted = node.needs(0);
    Tensor dx;
    if (wanted) {
      const bool room = g.unique() && g.pitch() >= g.dim(1) + tail;
      dx = room ? g : Tensor::with_tail(g.dim(0), g.dim(1), tail, g.dtype(), g.device());
    }
    for (const RowChunk& chunk : chunks) {
      Tape own;
      Variable in = own.input(input.slice_rows(chunk.begin, chunk.end), wanted);
      in.tail = tail;
      const Batch rows = rows_of(batch, chunk);
      const Variable out = mlp(own, layer, in, rows, false, false);
      if (!out.requires_grad()) continue;
      own.backward(out, g.slice_rows(chunk.begin, chunk.end));
      if (wanted) copy(dx.slice_rows(chunk.begin, chunk.end), own.gradient(in));
    }
    return std::vector<Tensor>{dx};
  };
  Variable result = tape.record("mlp", y, {h}, {{"mlp.h", h.value}}, backward, trains);
  result.tail = std::max(layer.down_proj.tail(batch), h.tail);
  return result;
}

Tensor Llama::embedded(const Batch& batch) const {
  if (!host_embeddings_) return gather_rows(embed_tokens_, batch.ids, compute_);
  if (batch.embedded.defined()) return batch.embedded;
  const Tensor ids = batch.ids.to(embed_tokens_.device());  // outside of planned steps
  synchronize(device_);
  return gather_rows(embed_tokens_, ids, compute_).to(device_);
}

Variable Llama::hidden(Tape& tape, const Batch& batch, const RecomputePolicy& policy,
                       KvCache* cache, HostSlots* host) const {
  if (cache == nullptr) cover_positions(batch.max_length);
  if (stream_) stream_->begin(batch.ids.device());
  Variable x = tape.input(embedded(batch));
  // The residual stream's gradient is one buffer; folded adapters of o and down work in its tail.
  for (const DecoderLayer& l : layers_)
    x.tail = std::max({x.tail, l.o_proj.tail(batch), l.down_proj.tail(batch)});
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Recompute recompute = policy.of(static_cast<int64_t>(l));
    const auto forward = [this, &tape, &batch, l, recompute, cache](const Variable& in) {
      const MemoryName name("layer ", static_cast<int64_t>(l));
      return layer(tape, layers_[l], static_cast<int64_t>(l), in, batch, recompute, cache);
    };
    QLAB_CHECK(recompute != Recompute::offload || host != nullptr, "nowhere to put layers aside");
    x = recompute < Recompute::full
            ? forward(x)
            : tape.recompute(forward, x, recompute == Recompute::offload ? host : nullptr,
                             policy.expands_once(static_cast<int64_t>(l)));
  }
  if (cache != nullptr) cache->length += batch.ids.numel();
  return x;
}

Variable Llama::loss(Tape& tape, const Batch& batch, const Variable& hidden) const {
  const MemoryName name("lm_head and loss");
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
    const MemoryName logits("logits");
    const Tensor z = Tensor::empty({end - begin, head.dim(0)}, compute_, device);
    gemm(z, normed.value.slice_rows(begin, end), Op::none, head, Op::transpose, 1.0f, 0.0f, {},
         SplitK::allowed);
    cross_entropy_inplace(nll.slice_rows(begin, end), z, batch.labels.slice_rows(begin, end),
                          trains ? batch.scale.slice_rows(begin, end) : Tensor());
    if (trains)
      gemm(dh.slice_rows(begin, end), z, Op::none, head, Op::none, 1.0f, 0.0f, {}, SplitK::allowed);
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
  cover_positions(capacity);
  KvCache cache;
  cache.capacity = capacity;
  for (size_t l = 0; l < layers_.size(); ++l) {
    cache.k.push_back(Tensor::empty({capacity, config_.kv_size()}, compute_, device_));
    cache.v.push_back(Tensor::empty({capacity, config_.kv_size()}, compute_, device_));
  }
  return cache;
}

}  // namespace qlab
