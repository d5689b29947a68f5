// What the adapters of one segment compute on the modules of a group (nn/linear.h), for at most
// row_unit of its rows, or of several segments of equal rows and modules:
//   s = A dropout(x)
//   ds = dy (scale B),   dB += scale dy^T s,   dA += ds^T dropout(x)
//   dx += mask (ds A) / (1 - p')
// x [T, K] is that of all modules, dy [T, N] has their outputs side by side; s, ds [T, R] have a
// part of columns for each. Segments follow one another along T and along R, where each has its own
// diagonal block of s and ds; their bits are those of each segment alone. On a GPU in bf16 each of
// these lines reads x and dy once for all modules, and no dropped copy of x is made; otherwise they
// are products and dropouts of their own, module by module.
#pragma once
#include <span>

#include "core/ops/dropout.h"
#include "nn/lora.h"

namespace qlab {

/// What the GPU's kernels take; with larger ranks the library is as fast at ds and dB.
inline constexpr int64_t max_kernel_rank = 32, max_dropout_rank = 64;
inline constexpr size_t max_kernel_parts = 4;
/// Segments of one call.
inline constexpr int max_segments = 8;

/// The adapter on one module. Its columns of s and ds are its rank, rounded up to fold_step.
struct AdapterPart {
  const LoraModule* lora;
  int64_t row;     // of the group's outputs where the module begins
  int64_t column;  // of R where the part begins
  DropoutKey dropout;

  int64_t r() const { return lora->a.dim(0); }
  int64_t out() const { return lora->b.dim(0); }
};

/// The adapters of segments and the rows that they meet. Where there are several, none has dropout,
/// and the modules' parts of one follow those of the one before.
struct AdapterRows {
  std::span<const AdapterPart> parts;
  Tensor examples, positions;  // of the rows
  int64_t segments = 1;

  /// The parts of a segment.
  std::span<const AdapterPart> of(int64_t segment) const {
    const size_t count = parts.size() / static_cast<size_t>(segments);
    return parts.subspan(static_cast<size_t>(segment) * count, count);
  }
  std::span<const AdapterPart> modules() const { return of(0); }
  float dropout() const { return parts.front().dropout.p; }
};

/// The rank columns of s or ds.
Tensor columns(const Tensor& s, const AdapterPart& part);
/// x where there is no dropout, otherwise a copy.
Tensor dropped(const Tensor& x, const AdapterPart& part, const AdapterRows& rows);

/// a [R, K]: A of every part at its columns, zeros between (nn/fold.h).
void adapter_forward(const Tensor& s, const Tensor& x, const Tensor& a, const AdapterRows& rows);
/// b [N, R]: scale B of every part in its module's rows and its columns, zeros elsewhere.
void adapter_backward(const Tensor& ds, const Tensor& dy, const Tensor& b, const Tensor& s,
                      const Tensor& x, const AdapterRows& rows);
/// Only dB and dA, where ds is known.
void adapter_gradients(const Tensor& ds, const Tensor& dy, const Tensor& s, const Tensor& x,
                       const AdapterRows& rows);
/// `a` as above, or undefined.
void adapter_input_gradient(const Tensor& dx, const Tensor& ds, const Tensor& a,
                            const AdapterRows& rows);

namespace cuda {
/// Whether the code that runs on the current device has these kernels; true where there is none.
bool adapter_kernels_present();
int64_t adapter_forward_workspace(int64_t tokens, int64_t k, const AdapterRows& rows);
int64_t adapter_out_workspace(int64_t tokens, const AdapterRows& rows);
int64_t adapter_in_workspace(int64_t tokens, int64_t k, const AdapterRows& rows);
/// With dropout.
void adapter_forward(const Tensor& s, const Tensor& x, const Tensor& a, const AdapterRows& rows,
                     const Tensor& workspace);
/// ds and dB, of several segments too.
void adapter_out_gradients(const Tensor& ds, const Tensor& dy, const Tensor& b, const Tensor& s,
                           const AdapterRows& rows, const Tensor& workspace);
/// dA, with dropout.
void adapter_in_gradients(const Tensor& ds, const Tensor& x, const AdapterRows& rows,
                          const Tensor& workspace);
/// dA of the parts += their rows of da, fp32 [R, K]; of several segments too.
void adapter_add_da(const Tensor& da, const AdapterRows& rows);
/// With dropout.
void adapter_input_gradient(const Tensor& dx, const Tensor& ds, const Tensor& a,
                            const AdapterRows& rows);
}  // namespace cuda
}  // namespace qlab
