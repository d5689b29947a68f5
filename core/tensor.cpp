#include "core/tensor.h"

#include <cstring>

#include "core/ops/copy.h"

namespace qlab {

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.pitch_ = t.cols();
  t.storage_ = Storage::allocate(t.bytes(), device);
  if (t.storage_->wants_kind()) t.storage_->set_kind(fmt::format("{} {}", name_of(dtype), shape));
  return t;
}

Tensor Tensor::zeros(const Shape& shape, DType dtype, Device device) {
  Tensor t = empty(shape, dtype, device);
  fill_zero(t);
  return t;
}

Tensor Tensor::pitched(int64_t rows, int64_t cols, int64_t pitch, DType dtype, Device device) {
  QLAB_CHECK(pitch >= cols, "a pitch of {} is below the {} columns", pitch, cols);
  return empty({rows, pitch}, dtype, device).slice_cols(0, cols);
}

Tensor Tensor::with_tail(int64_t rows, int64_t cols, int64_t tail, DType dtype, Device device) {
  constexpr int64_t step = 64;
  if (tail == 0) return empty({rows, cols}, dtype, device);
  return pitched(rows, cols, (cols + tail + step - 1) / step * step, dtype, device);
}

Tensor Tensor::from_storage(std::shared_ptr<Storage> storage, int64_t byte_offset,
                            const Shape& shape, DType dtype) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.pitch_ = t.cols();
  t.offset_ = byte_offset;
  QLAB_CHECK(byte_offset + t.bytes() <= storage->bytes(), "tensor {} exceeds its storage of {}",
             shape, storage->bytes());
  t.storage_ = std::move(storage);
  return t;
}

template <class T>
Tensor Tensor::from_vector(const std::vector<T>& values, const Shape& shape, Device device) {
  QLAB_CHECK(static_cast<int64_t>(values.size()) == shape.numel(), "{} values for shape {}",
             values.size(), shape);
  Tensor t = empty(shape, dtype_of<T>(), device);
  const size_t bytes = values.size() * sizeof(T);
  if (bytes == 0) return t;
  on_device(
      device, [&] { std::memcpy(t.raw(), values.data(), bytes); },
      [&] { cuda::copy_async(t.raw(), values.data(), bytes); });
  return t;
}

Tensor Tensor::view(const Shape& shape) const {
  QLAB_CHECK(contiguous() && shape.numel() == numel(), "cannot view {} as {}", str(), shape);
  Tensor t = *this;
  t.shape_ = shape;
  t.pitch_ = t.cols();
  t.column_ = 0;
  return t;
}

Tensor Tensor::slice_rows(int64_t begin, int64_t end) const {
  QLAB_CHECK(rank() >= 1 && 0 <= begin && begin <= end && end <= dim(0), "rows {} to {} of {}",
             begin, end, str());
  QLAB_CHECK(rank() <= 2 || contiguous(), "rows of a tensor with a pitch must have rank 2");
  Tensor t = *this;
  Shape shape;
  shape.push_back(end - begin);
  for (int i = 1; i < rank(); ++i) shape.push_back(dim(i));
  const int64_t step = rank() == 1   ? 1
                       : rank() == 2 ? pitch_
                                     : numel() / std::max<int64_t>(dim(0), 1);
  t.shape_ = shape;
  if (rank() == 1) t.pitch_ = end - begin;
  t.offset_ += begin * step * static_cast<int64_t>(size_of(dtype_));
  return t;
}

Tensor Tensor::slice_cols(int64_t begin, int64_t end) const {
  QLAB_CHECK(rank() == 2 && 0 <= begin && begin <= end && end <= dim(1), "columns {} to {} of {}",
             begin, end, str());
  Tensor t = *this;
  t.shape_ = {dim(0), end - begin};
  t.column_ += begin;
  t.offset_ += begin * static_cast<int64_t>(size_of(dtype_));
  return t;
}

Tensor Tensor::bytes_at(int64_t offset, const Shape& shape, DType dtype) const {
  return from_storage(storage_, offset_ + offset, shape, dtype);
}

Tensor Tensor::widened(int64_t cols) const {
  QLAB_CHECK(rank() == 2 && dim(1) <= cols && column_ + cols <= pitch_,
             "{} from column {} of its block of {} has no {} columns", str(), column_, pitch_,
             cols);
  Tensor t = *this;
  t.shape_ = {dim(0), cols};
  return t;
}

Tensor Tensor::clone() const {
  Tensor t = empty(shape_, dtype_, device());
  copy(t, *this);
  return t;
}

Tensor Tensor::to(Device device) const {
  if (device == this->device()) return *this;
  Tensor t = empty(shape_, dtype_, device);
  copy(t, *this);
  return t;
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  QLAB_CHECK(!device().is_meta(), "a meta tensor has no values: {}", str());
  QLAB_CHECK(dtype_ == dtype_of<T>(), "tensor holds {}, asked for {}", name_of(dtype_),
             name_of(dtype_of<T>()));
  const Tensor host = (contiguous() ? *this : clone()).to(Device::cpu());
  synchronize(device());
  std::vector<T> values(static_cast<size_t>(numel()));
  if (!values.empty()) std::memcpy(values.data(), host.raw(), values.size() * sizeof(T));
  return values;
}

std::string Tensor::str() const {
  if (!defined()) return "no tensor";
  return fmt::format("{} {}{} on {}", name_of(dtype_), shape_.str(),
                     contiguous() ? "" : fmt::format(" (pitch {})", pitch_), device().str());
}

#define QLAB_INSTANTIATE(T)                                                            \
  template Tensor Tensor::from_vector<T>(const std::vector<T>&, const Shape&, Device); \
  template std::vector<T> Tensor::to_vector<T>() const;
QLAB_INSTANTIATE(double)
QLAB_INSTANTIATE(float)
QLAB_INSTANTIATE(bf16)
QLAB_INSTANTIATE(f16)
QLAB_INSTANTIATE(int64_t)
QLAB_INSTANTIATE(int32_t)
QLAB_INSTANTIATE(uint8_t)
#undef QLAB_INSTANTIATE

void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& shape) {
  QLAB_CHECK(tensor.defined() && tensor.shape() == shape, "[{}] {} must be {}, got {}", op, name,
             shape, tensor.str());
}

void check_device(const char* op, const Tensor& a, const Tensor& b) {
  const Device x = a.device(), y = b.device();
  QLAB_CHECK(x.target == y.target && x.index == y.index, "[{}] arguments live on {} and {}", op,
             x.str(), y.str());
}

}  // namespace qlab
