// Frozen linear modules with their adapters: y = W x + scale B A dropout(x) (nn/lora.h). Modules
// that read the same input are one group with one product. Tokens of several trials share that
// product; each segment of tokens meets its own A and B. Two implementations:
//   separate: y = x W^T, then += scale s B^T per segment and module;
//   folded: one product with the adapters beside the weight (nn/fold.h), s in the tail of x and ds
//   in the tail of dy.
// Their bits differ, and a model stays with one (LinearGroup::folded). While text is generated,
// NF4 is decoded inside the product where that is faster (quant/nf4_dispatch.h): no gradient is
// wanted then, and there is one segment.
#pragma once
#include "autograd/tape.h"
#include "nn/batch.h"
#include "nn/layer_stream.h"
#include "nn/lora.h"
#include "quant/weight.h"

namespace qlab {

/// A frozen linear module of the base model.
struct Linear {
  int index = 0;     // among the model's linears, in the order of the layers
  std::string name;  // model.layers.0.self_attn.q_proj
  Weight weight;
  Tensor bias;  // fp32 [out], or undefined
};

/// Modules of one input, their outputs side by side: q, k, v; gate, up; or one alone.
struct LinearGroup {
  std::vector<Linear> members;
  bool folded = false;
  /// The block of nn/fold.h with W already expanded, [N + R, K + R] with room for some R, where the
  /// model holds it resident; undefined otherwise.
  Tensor resident;
  /// Forward passes so far: each leaves its adapters in `resident`, where its backward pass finds
  /// them unless another came between.
  mutable int64_t passes = 0;
  /// Where the weights wait on the host: who brings them, and the layer's number there.
  LayerStream* stream = nullptr;
  size_t streamed = 0;

  int64_t in_features() const { return members.front().weight.in_features(); }
  int64_t out_features() const;
  /// Columns that the input needs behind its own for the adapters of a batch.
  int64_t tail(const Batch& batch) const;
  /// Whether an adapter of the batch is on one of the modules.
  bool trains(const Batch& batch) const;
};

/// x [T, K], best allocated with group.tail(batch), to [T, N], plus `residual` where defined.
Variable linear(Tape& tape, const Variable& x, const LinearGroup& group, const Batch& batch,
                const Variable& residual = {});

}  // namespace qlab
