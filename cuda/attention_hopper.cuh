// Flash attention for compute capability 9.0: warpgroup products fed by tensor copies. bf16, head
// sizes 64 and 128; every row starts at 16 bytes.
#pragma once
#include "core/ops/attention.h"

namespace qlab::cuda {

/// Whether this device and build, the dtype and the head size let the functions below run.
bool hopper_attention_supported(const AttentionShape& shape, const Tensor& q);
void hopper_attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                      const AttentionShape& shape);
void hopper_attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                               const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& o, const Tensor& lse, const Tensor& cu_q,
                               const Tensor& cu_k, const AttentionShape& shape,
                               const Tensor& workspace);

}  // namespace qlab::cuda
