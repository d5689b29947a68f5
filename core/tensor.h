// A handle to a block of elements: dtype, shape, device, and a row pitch. Copying a Tensor shares
// its memory; clone() copies it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/memory.h"
#include "core/shape.h"

namespace qlab {

class Tensor {
 public:
  Tensor() = default;  // no tensor: defined() is false
  /// Uninitialized memory of the current MemoryTag.
  static Tensor empty(const Shape& shape, DType dtype, Device device);
  static Tensor zeros(const Shape& shape, DType dtype, Device device);
  /// Rank 2 with `pitch` elements between rows, so that columns can be carved out of a wider block.
  static Tensor pitched(int64_t rows, int64_t cols, int64_t pitch, DType dtype, Device device);
  /// Rank 2 with room for `tail` more columns behind each row, at a pitch that is a multiple of 64;
  /// contiguous where `tail` is 0. widened() reaches them.
  static Tensor with_tail(int64_t rows, int64_t cols, int64_t tail, DType dtype, Device device);
  static Tensor from_storage(std::shared_ptr<Storage> storage, int64_t byte_offset,
                             const Shape& shape, DType dtype);
  template <class T>
  static Tensor from_vector(const std::vector<T>& values, const Shape& shape, Device device);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t numel() const { return shape_.numel(); }
  /// All leading dimensions as one, and the last.
  int64_t rows() const { return cols() == 0 ? 0 : numel() / cols(); }
  int64_t cols() const { return rank() == 0 ? 1 : shape_[-1]; }
  int64_t pitch() const { return pitch_; }  // elements between the starts of consecutive rows
  bool contiguous() const { return pitch_ == cols() || rows() <= 1; }
  DType dtype() const { return dtype_; }
  Device device() const { return storage_->device(); }
  int64_t bytes() const { return numel() * static_cast<int64_t>(size_of(dtype_)); }
  const std::shared_ptr<Storage>& storage() const { return storage_; }
  /// True when no other tensor shares this memory, so it may be written in place.
  bool unique() const { return storage_.use_count() == 1; }

  template <class T>
  T* data() const {
    QLAB_CHECK(dtype_ == dtype_of<T>(), "tensor holds {}, asked for {}", name_of(dtype_),
               name_of(dtype_of<T>()));
    return static_cast<T*>(raw());
  }
  void* raw() const {
    return storage_->data() == nullptr ? nullptr : static_cast<char*>(storage_->data()) + offset_;
  }

  // Views share memory.
  Tensor view(const Shape& shape) const;                // contiguous tensors only
  Tensor slice_rows(int64_t begin, int64_t end) const;  // rank 1: elements
  Tensor slice_cols(int64_t begin, int64_t end) const;  // rank 2; keeps the pitch
  Tensor widened(int64_t cols) const;                   // rank 2; more of the block's columns
  /// Another view of a block's bytes, from `offset` on.
  Tensor bytes_at(int64_t offset, const Shape& shape, DType dtype) const;

  // Copies.
  Tensor clone() const;            // contiguous, same device
  Tensor to(Device device) const;  // contiguous; this tensor itself when already there
  template <class T>
  std::vector<T> to_vector() const;  // synchronizes when on a GPU
  std::string str() const;           // "float32 [2, 3] on cpu"

 private:
  std::shared_ptr<Storage> storage_;
  int64_t offset_ = 0;  // bytes
  int64_t pitch_ = 0;
  int64_t column_ = 0;  // of the block with this pitch, where the rows begin
  Shape shape_;
  DType dtype_ = DType::f32;
};

/// Bytes of several tensors together: what an operation reads and writes.
template <class... Tensors>
double bytes_of_all(const Tensors&... tensors) {
  return static_cast<double>(((tensors.defined() ? tensors.bytes() : 0) + ...));
}

/// Throws unless `tensor` has the shape; the text names the operation and the argument.
void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& shape);
/// Throws unless both live on the same device; a meta tensor matches its target.
void check_device(const char* op, const Tensor& a, const Tensor& b);

}  // namespace qlab
