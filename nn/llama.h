// A frozen Llama-family decoder (Touvron et al. 2023): embedding, layers of RMSNorm, grouped-query
// attention with RoPE, RMSNorm, SwiGLU; final norm; lm_head. Transformers' module names.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autograd/functions.h"
#include "nn/batch.h"
#include "nn/linear.h"
#include "nn/llama_config.h"

namespace qlab {

/// What the backward pass computes again instead of having kept it: nothing; the outputs of norms
/// and of SwiGLU, elementwise work alone; or whole layers, of which the input is kept and narrow s
/// of adapters (nn/linear.cpp), and whose MLP takes at most row_unit tokens at a time; or the same
/// with the input put aside on the host and no s.
enum class Recompute : uint8_t { none, selective, full, offload };

/// The same for each layer, or one for all. Bits do not depend on it.
class RecomputePolicy {
 public:
  RecomputePolicy(Recompute all = Recompute::none) : all_(all) {}
  /// The first `expanded_once` layers, where computed again in full, keep the weights that their
  /// second run expands for the backward right behind it.
  explicit RecomputePolicy(std::vector<Recompute> layers, int64_t expanded_once = 0)
      : layers_(std::move(layers)), expanded_once_(expanded_once) {}
  Recompute of(int64_t layer) const {
    return layers_.empty() ? all_ : layers_.at(static_cast<size_t>(layer));
  }
  bool expands_once(int64_t layer) const { return layer < expanded_once_; }

 private:
  Recompute all_ = Recompute::none;
  std::vector<Recompute> layers_;
  int64_t expanded_once_ = 0;
};

struct DecoderLayer {
  Tensor input_layernorm, post_attention_layernorm;  // fp32 [hidden]
  LinearGroup qkv_proj, o_proj, gate_up_proj, down_proj;
};

/// Keys and values of one sequence while it is generated: per layer [capacity, kv_size].
struct KvCache {
  std::vector<Tensor> k, v;
  int64_t length = 0, capacity = 0;
};

/// Where a model's tensors come from: a checkpoint or a seeded generator. Returns f32 or bf16 on
/// the CPU, or a meta tensor; names as in Transformers.
using TensorSource = std::function<Tensor(const std::string& name, const Shape& shape)>;

class Llama {
 public:
  /// Layer by layer: a tensor is read, moved, quantized and dropped before the next is read. With
  /// `host_embeddings` the input embeddings stay in host memory, and a micro-batch brings its rows
  /// along (Batch::embedded); lm_head must not be tied to them. The weights of `streamed_layers`
  /// of the layers, spread evenly so that copies overlap with the layers between them, wait on the
  /// host and come when a pass needs them (nn/layer_stream.h).
  Llama(const LlamaConfig& config, const WeightSpec& spec, DType compute, Device device,
        const TensorSource& source, bool host_embeddings = false, int64_t streamed_layers = 0);

  const LlamaConfig& config() const { return config_; }
  const WeightSpec& spec() const { return spec_; }
  DType compute_dtype() const { return compute_; }
  Device device() const { return device_; }

  /// Whether adapters are computed inside the products with the weights (nn/linear.h). On by
  /// default where weights are expanded for a GPU anyway.
  void set_folded(bool folded);
  /// Keeps as many groups of linear modules as fit into `budget` bytes expanded, with room for the
  /// adapters of batches like `batch`; the first layers come first, streamed ones are left out. 0
  /// drops what was held. True when anything changed. Needs folded adapters; the values are the
  /// same either way.
  bool hold_resident(int64_t budget, const Batch& batch);
  int64_t resident_bytes() const;  // held now
  /// The input embeddings where they lie in host memory, otherwise nullptr.
  const Tensor* host_embeddings() const { return host_embeddings_ ? &embed_tokens_ : nullptr; }
  int64_t streamed_layers() const { return stream_ ? stream_->size() : 0; }
  int64_t streamed_bytes() const { return stream_ ? stream_->host_bytes() : 0; }
  /// To be called when a step has been issued.
  void end_step() const {
    if (stream_) stream_->end();
  }
  /// Makes the rotary tables long enough; to be called before a step that needs it is planned.
  void cover_positions(int64_t positions) const;
  void forget_positions() { rope_ = {}; }
  /// How often the tables were made: what was recorded with earlier ones reads freed memory.
  int position_generation() const { return rope_generation_; }
  /// Of the copies of an adapter that products read: fp32 (none) where adapters are folded from
  /// their fp32 values and nothing is dropped, otherwise the compute dtype.
  DType adapter_dtype(const LoraSpec& spec) const;
  std::vector<std::string> linear_names() const;
  std::vector<Adapter::Shape> adapter_shapes(const LoraSpec& spec) const;

  /// Hidden states after the last layer, before the final norm: [T, hidden].
  Variable hidden(Tape& tape, const Batch& batch, const RecomputePolicy& policy = {},
                  KvCache* cache = nullptr, HostSlots* host = nullptr) const;
  /// nll fp32 [R] of the batch's trained rows; the gradient of sum_r scale_r nll_r goes back from
  /// it. Logits exist for `loss_chunk` rows at a time.
  Variable loss(Tape& tape, const Batch& batch, const Variable& hidden) const;
  /// Logits [rows, vocab] in the compute dtype of the given rows of the hidden states.
  Tensor logits(const Tensor& hidden) const;

  KvCache make_cache(int64_t capacity) const;

 private:
  void move_to_host(DecoderLayer& layer);
  const std::vector<const Linear*> linears() const;
  Tensor embedded(const Batch& batch) const;
  Variable layer(Tape& tape, const DecoderLayer& layer, int64_t index, const Variable& x,
                 const Batch& batch, Recompute recompute, KvCache* cache) const;
  Variable mlp(Tape& tape, const DecoderLayer& layer, const Variable& h, const Batch& batch,
               bool selective, bool wanted) const;
  Variable mlp_in_chunks(Tape& tape, const DecoderLayer& layer, const Variable& h,
                         const Batch& batch) const;

  LlamaConfig config_;
  WeightSpec spec_;
  DType compute_;
  Device device_;
  Tensor embed_tokens_, norm_;
  Weight lm_head_;
  bool host_embeddings_ = false, folded_ = false;
  mutable RopeTables rope_;  // of the positions that occur
  mutable int rope_generation_ = 0;
  std::unique_ptr<LayerStream> stream_;  // of the layers whose weights wait on the host
  std::vector<DecoderLayer> layers_;
};

}  // namespace qlab
