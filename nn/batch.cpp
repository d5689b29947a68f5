#include "nn/batch.h"

#include <algorithm>
#include <cstring>

#include "core/ops/cross_entropy.h"

namespace qlab {

void BatchBuilder::add(const std::vector<Sequence>& sequences, const Adapter* adapter, bool dropout,
                       float scale) {
  Segment segment{tokens(), 0, loss_tokens(), 0, adapter, dropout};
  for (const Sequence& s : sequences) {
    const int64_t begin = tokens(), length = static_cast<int64_t>(s.ids.size());
    for (int64_t i = 0; i < length; ++i) {
      ids_.push_back(s.ids[i]);
      positions_.push_back(static_cast<int32_t>(i));
      examples_.push_back(s.example);
      if (i + 1 < length && s.labels[i + 1] != ignore_label) {
        loss_rows_.push_back(static_cast<int32_t>(begin + i));
        labels_.push_back(s.labels[i + 1]);
        scale_.push_back(scale);
      }
    }
    cu_seqlens_.push_back(static_cast<int32_t>(begin + length));
    max_length_ = std::max(max_length_, length);
  }
  segment.end = tokens();
  segment.loss_end = loss_tokens();
  segments_.push_back(segment);
}

template <class Place>
Batch BatchBuilder::placed(const Place& place, Device device) const {
  // A GPU's products through lm_head always have full chunks, so that a row's bits do not depend on
  // how many rows there are. Padding trains nothing.
  const auto padded = [&]<class T>(std::vector<T> values, T padding) {
    if (device.target == DeviceType::cuda)
      values.resize((values.size() + loss_chunk - 1) / loss_chunk * loss_chunk, padding);
    return values;
  };
  Batch batch;
  batch.ids = place(ids_);
  batch.positions = place(positions_);
  batch.examples = place(examples_);
  batch.cu_seqlens = place(cu_seqlens_);
  batch.max_length = max_length_;
  batch.loss_rows = place(padded(loss_rows_, int32_t{-1}));
  batch.labels = place(padded(labels_, ignore_label));
  batch.scale = place(padded(scale_, 0.0f));
  batch.segments = segments_;
  return batch;
}

Batch BatchBuilder::to(Device device) const {
  return placed(
      [&]<class T>(const std::vector<T>& values) {
        return Tensor::from_vector(values, {static_cast<int64_t>(values.size())}, device);
      },
      device);
}

Batch BatchBuilder::to(BatchBuffer& buffer) const {
  if (!buffer.device().is_cuda()) {
    buffer.results_ = Tensor::empty({loss_tokens()}, DType::f32, buffer.device());
    return to(buffer.device());
  }
  constexpr int64_t alignment = 256;
  const auto aligned = [](int64_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  };
  int64_t end = 0, rows = 0;
  placed(
      [&]<class T>(const std::vector<T>& values) {
        end += aligned(static_cast<int64_t>(values.size() * sizeof(T)));
        rows = static_cast<int64_t>(values.size());  // the last array is as long as nll
        return Tensor();
      },
      buffer.device());
  buffer.reserve(end + aligned(rows * static_cast<int64_t>(sizeof(float))));
  int64_t offset = 0;
  const auto take = [&](int64_t count, DType dtype) {
    const Tensor view = buffer.block_.bytes_at(offset, {count}, dtype);
    offset += aligned(view.bytes());
    return view;
  };
  Batch batch = placed(
      [&]<class T>(const std::vector<T>& values) {
        if (!values.empty())
          std::memcpy(buffer.host_ + offset, values.data(), values.size() * sizeof(T));
        return take(static_cast<int64_t>(values.size()), dtype_of<T>());
      },
      buffer.device());
  cuda::copy_async(buffer.block_.raw(), buffer.host_, static_cast<size_t>(end));
  buffer.results_ = take(rows, DType::f32);
  return batch;
}

BatchBuffer::~BatchBuffer() {
  if (host_ != nullptr) cuda::release_pinned(host_);
}

void BatchBuffer::reserve(int64_t bytes) {
  if (bytes <= host_bytes_) return;
  bytes += bytes / 2;
  if (host_ != nullptr) cuda::release_pinned(host_);
  host_ = nullptr, host_bytes_ = 0;
  block_ = Tensor();
  const MemoryTag tag(Category::workspace);
  block_ = Tensor::empty({bytes}, DType::u8, device_);
  host_ = static_cast<char*>(cuda::allocate_pinned(static_cast<size_t>(bytes)));
  if (host_ == nullptr)
    fail("{} of page-locked host memory for a batch could not be had", format_bytes(bytes));
  host_bytes_ = bytes;
}

std::vector<float> BatchBuffer::read_results() const {
  if (!device_.is_cuda()) return results_.to_vector<float>();
  std::vector<float> values(static_cast<size_t>(results_.numel()));
  cuda::copy_async(host_, results_.raw(), static_cast<size_t>(results_.bytes()));
  synchronize(device_);
  if (!values.empty()) std::memcpy(values.data(), host_, values.size() * sizeof(float));
  return values;
}

std::vector<int64_t> BatchBuilder::shape_key() const {
  std::vector<int64_t> key{static_cast<int64_t>(cu_seqlens_.size()), max_length_};
  for (const Segment& s : segments_) {
    const auto adapter = static_cast<int64_t>(reinterpret_cast<uintptr_t>(s.adapter));
    key.insert(key.end(), {s.begin, s.end, s.loss_begin, s.loss_end, adapter, s.dropout});
  }
  return key;
}

int64_t trained_tokens(const Sequence& sequence) {
  int64_t n = 0;
  for (size_t i = 1; i < sequence.labels.size(); ++i) n += sequence.labels[i] != ignore_label;
  return n;
}

}  // namespace qlab
