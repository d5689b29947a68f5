// Every differentiable operation of core, one line each; formulas stand in core/ops/<name>.h.
#pragma once
#include "autograd/tape.h"
#include "core/ops/attention.h"
#include "core/ops/rope.h"

namespace qlab {

Variable add(Tape& tape, const Variable& a, const Variable& b);
/// Adds what x has collected besides, so it costs no pass of its own. `tail`: of the result.
Variable rms_norm(Tape& tape, const Variable& x, const Tensor& weight, float eps, int64_t tail = 0);
/// Rotates the first `columns` columns of qkv in place: the result is on the same tensor, which no
/// earlier node may have saved.
Variable rope(Tape& tape, const Variable& qkv, int64_t columns, const Tensor& positions,
              const RopeTables& tables, int64_t head_dim);
/// qkv.value is q | k | v, [T, (heads + 2 kv_heads) D]; the result has room for `tail` more
/// columns.
Variable attention(Tape& tape, const Variable& qkv, const Tensor& cu_seqlens,
                   const AttentionShape& shape, int64_t tail = 0);
Variable swiglu(Tape& tape, const Variable& gate_up, int64_t tail = 0);
Variable gather_rows(Tape& tape, const Variable& x, const Tensor& index);

}  // namespace qlab
