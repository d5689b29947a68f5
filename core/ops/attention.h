// Causal grouped-query attention over packed sequences (Vaswani et al. 2017, eq. 1; GQA: Ainslie et
// al. 2023). Sequence s owns query rows cu_q[s] .. cu_q[s+1] and key rows cu_k[s] .. cu_k[s+1]; its
// last query sees its last key, so query i sees keys j <= i + len_k - len_q. Query head h reads
// key/value head h / (heads / kv_heads).
//   S = Q K^T / sqrt(D),  P = softmax(S) over the visible keys,  O = P V,  L = log sum exp S
//   dP = dO V^T,  delta = rowsum(dO * O),  dS = P (dP - delta) / sqrt(D)
//   dQ = dS K,  dK = dS^T Q,  dV = P^T dO     (dK, dV summed over the heads of a group, in order)
// Saved: q, k, v, o, L; P is recomputed from L (Dao et al. 2022), never stored in full.
// Shapes: q, o [Tq, heads * D]; k, v [Tk, kv_heads * D]; L fp32 [Tq, heads] (f64 for f64);
// cu_q, cu_k i32 [sequences + 1]. All matrices may be columns of wider ones. The gradient is
// dqkv = dq | dk | dv side by side, [T, (heads + 2 kv_heads) D]; there Tq = Tk = T. `tail`: room
// for that many more columns behind the result (Tensor::with_tail). Every reduction is inside one
// sequence, in a fixed order.
#pragma once
#include "core/tensor.h"

namespace qlab {

struct AttentionShape {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  int64_t max_q = 0, max_k = 0;  // longest sequence, known on the host
};
struct Attention {
  Tensor o, lse;
};
Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                    const Tensor& cu_k, const AttentionShape& shape, int64_t tail = 0);
Tensor attention_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& o, const Tensor& lse, const Tensor& cu_q,
                          const Tensor& cu_k, const AttentionShape& shape, int64_t tail = 0);

/// q, k and v (or their gradients) inside a merged [T, (heads + 2 kv_heads) D].
struct AttentionColumns {
  Tensor q, k, v;
};
AttentionColumns attention_columns(const Tensor& merged, const AttentionShape& shape);

/// Queries of a head in the GPU's workspace: every sequence may be aligned to 4 and padded to 64.
inline int64_t attention_stats_pitch(int64_t query_rows, int64_t sequences) {
  return (query_rows + 3) / 4 * 4 + 68 * sequences;
}

namespace cpu {
/// Bytes: per thread, the keys and values of one sequence and head, and the scores of a query tile.
int64_t attention_workspace(const AttentionShape& shape, DType dtype);
int64_t attention_backward_workspace(const AttentionShape& shape, DType dtype);
void attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape,
               const Tensor& workspace);
void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& g,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                        const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        const AttentionShape& shape, const Tensor& workspace);
}  // namespace cpu
namespace cuda {
/// `workspace` of the backward pass holds L and delta, fp32 [heads, attention_stats_pitch] each.
/// The forward needs none.
void attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape,
               const Tensor& workspace);
void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& g,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                        const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        const AttentionShape& shape, const Tensor& workspace);
}  // namespace cuda
}  // namespace qlab
