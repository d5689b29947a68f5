// A frozen weight matrix [N, K] in one of the storage formats, and its two products: y = x W^T and
// dx = dy W read the same storage. Formats that differ from the compute dtype are expanded into a
// scratch of the step just before the product.
//
// int8 is LLM.int8's storage (Dettmers et al. 2022, section 3: one byte a weight and one fp32 scale
// a row) on paper: its bytes are known on a meta device, and there is nothing to compute with it.
#pragma once
#include <vector>

#include "autograd/tape.h"
#include "core/tensor.h"
#include "quant/nf4_dispatch.h"

namespace qlab {

enum class WeightFormat : uint8_t { fp32, bf16, fp16, nf4, int8 };
const char* name_of(WeightFormat format);

struct WeightSpec {
  WeightFormat format = WeightFormat::nf4;
  int64_t block_size = 64;
  bool double_quant = true;
};

class Weight {
 public:
  Weight() = default;
  /// w: [N, K], f32 or bf16, on the device where the weight shall live (or meta).
  static Weight from_dense(const Tensor& w, const WeightSpec& spec);
  /// The tensor itself, shared (tied embeddings); its dtype must be the format's.
  static Weight share(const Tensor& w, WeightFormat format);

  int64_t out_features() const { return shape_[0]; }
  int64_t in_features() const { return shape_[1]; }
  WeightFormat format() const { return format_; }
  /// The values in `dtype`: the storage itself when it already has it, otherwise a scratch of the
  /// caller's step, on `device` (the weight's own, or its meta twin in a dry run).
  Tensor dense(DType dtype, Device device) const;
  /// The kernel that multiplies so few rows faster without such a scratch, where there is one.
  std::optional<Nf4Kernel> fused_kernel(Op op, int64_t rows, DType dtype, Device device) const;
  /// y = x op(W), plus `addend` where defined, by that kernel.
  void multiply(const Tensor& y, const Tensor& x, Op op, Nf4Kernel kernel,
                const Tensor& addend) const;
  /// Writes the values to y [N, K], whose row pitch is honoured.
  void expand(const Tensor& y) const;
  /// The tensors that hold it, for whoever keeps them elsewhere.
  std::vector<Tensor*> parts();

 private:
  Shape shape_;
  WeightFormat format_ = WeightFormat::fp32;
  Tensor dense_;       // of int8 the codes
  Tensor row_scales_;  // of int8: fp32 [N]
  Nf4Tensor nf4_;
};

}  // namespace qlab
