#include "quant/weight.h"

#include "core/ops/copy.h"

namespace qlab {

const char* name_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::fp32:
      return "fp32";
    case WeightFormat::bf16:
      return "bf16";
    case WeightFormat::fp16:
      return "fp16";
    case WeightFormat::nf4:
      return "nf4";
    case WeightFormat::int8:
      return "int8";
  }
  return "?";
}

Weight Weight::from_dense(const Tensor& w, const WeightSpec& spec) {
  QLAB_CHECK(w.rank() == 2, "a weight is a matrix, got {}", w.str());
  Weight weight;
  weight.shape_ = w.shape();
  weight.format_ = spec.format;
  if (spec.format == WeightFormat::nf4) {
    weight.nf4_ = quantize_nf4(w, spec.block_size, spec.double_quant);
    return weight;
  }
  if (spec.format == WeightFormat::int8) {
    if (!w.device().is_meta())
      fail(
          "int8: only the bytes of such weights are known, nothing computes with them; use nf4, "
          "bf16, fp16 or fp32");
    {
      const MemoryTag tag(Category::weights);
      weight.dense_ = Tensor::empty(w.shape(), DType::u8, w.device());
    }
    const MemoryTag tag(Category::constants);
    weight.row_scales_ = Tensor::empty({w.dim(0)}, DType::f32, w.device());
    return weight;
  }
  const MemoryTag tag(Category::weights);
  weight.dense_ = Tensor::empty(w.shape(), dtype_from_name(name_of(spec.format)), w.device());
  copy(weight.dense_, w);
  return weight;
}

Weight Weight::share(const Tensor& w, WeightFormat format) {
  Weight weight;
  weight.shape_ = w.shape();
  weight.format_ = format;
  weight.dense_ = w;
  return weight;
}

Tensor Weight::dense(DType dtype, Device device) const {
  if (format_ != WeightFormat::nf4 && dense_.dtype() == dtype) return dense_;
  const MemoryTag tag(Category::workspace);
  const MemoryName name("weight expanded");
  Tensor scratch = Tensor::empty(shape_, dtype, device);
  expand(scratch);
  return scratch;
}

std::optional<Nf4Kernel> Weight::fused_kernel(Op op, int64_t rows, DType dtype,
                                              Device device) const {
  if (format_ != WeightFormat::nf4) return std::nullopt;
  return fastest_nf4_kernel(nf4_, op, rows, dtype, device);
}

void Weight::multiply(const Tensor& y, const Tensor& x, Op op, Nf4Kernel kernel,
                      const Tensor& addend) const {
  nf4_matmul(y, x, nf4_, op, kernel, addend);
}

void Weight::expand(const Tensor& y) const {
  if (format_ == WeightFormat::nf4)
    dequantize_nf4(y, nf4_);
  else if (format_ != WeightFormat::int8)  // which exists on meta alone
    copy(y, dense_);
}

std::vector<Tensor*> Weight::parts() {
  std::vector<Tensor*> defined;
  for (Tensor* part : {&dense_, &row_scales_, &nf4_.codes, &nf4_.absmax, &nf4_.absmax_code,
                       &nf4_.absmax2, &nf4_.offset})
    if (part->defined()) defined.push_back(part);
  return defined;
}

}  // namespace qlab
