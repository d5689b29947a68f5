#include "nn/batch.h"

#include <algorithm>
#include <cstring>

#include "core/ops/cross_entropy.h"
#include "core/ops/rows.h"
#include "core/profile.h"

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

std::vector<RowChunk> row_chunks(const Batch& batch) {
  std::vector<RowChunk> chunks;
  for (const Segment& s : batch.segments)
    for (int64_t begin = s.begin; begin < s.end; begin += row_unit) {
      const int64_t end = std::min(begin + row_unit, s.end);
      const bool fits = !chunks.empty() && end - chunks.back().begin <= row_unit;
      if (fits || (begin > s.begin && end - begin == 1))
        chunks.back().end = end;
      else
        chunks.push_back({begin, end});
    }
  return chunks;
}

Batch rows_of(const Batch& batch, const RowChunk& chunk) {
  Batch rows;
  rows.positions = batch.positions.slice_rows(chunk.begin, chunk.end);
  if (batch.examples.defined()) rows.examples = batch.examples.slice_rows(chunk.begin, chunk.end);
  for (const Segment& s : batch.segments) {
    const int64_t begin = std::max(s.begin, chunk.begin), end = std::min(s.end, chunk.end);
    if (begin < end)
      rows.segments.push_back({begin - chunk.begin, end - chunk.begin, 0, 0, s.adapter, s.dropout});
  }
  return rows;
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

namespace {

int64_t aligned(int64_t bytes) {
  constexpr int64_t alignment = 256;
  return (bytes + alignment - 1) / alignment * alignment;
}

/// A tensor of memory that someone else owns, none on meta.
Tensor view_of(const void* data, const Shape& shape, DType dtype, Device device) {
  const int64_t bytes = shape.numel() * static_cast<int64_t>(size_of(dtype));
  return Tensor::from_storage(Storage::wrap(const_cast<void*>(data), bytes, {}, device), 0, shape,
                              dtype);
}

}  // namespace

/// rows [T, hidden] on the host.
void BatchBuilder::embed(const Tensor& rows, const Tensor& embeddings) const {
  const Tensor ids = view_of(ids_.data(), {tokens()}, DType::i32, Device::cpu());
  if (tokens() > 0) cpu::gather_rows(rows, embeddings, ids);
}

Batch BatchBuilder::to(Device device, const Tensor* embeddings) const {
  Batch batch = placed(
      [&]<class T>(const std::vector<T>& values) {
        const Shape shape{static_cast<int64_t>(values.size())};
        if (!device.is_meta()) return Tensor::from_vector(values, shape, device);
        return view_of(nullptr, shape, dtype_of<T>(), device);
      },
      device);
  if (embeddings == nullptr) return batch;
  const Shape shape = embedded_shape(*embeddings);
  if (device.is_meta()) {
    batch.embedded = view_of(nullptr, shape, embeddings->dtype(), device);
    const OpScope scope("embedding rows", device, {0, bytes_of_all(batch.embedded)});
  } else {
    const Tensor rows = Tensor::empty(shape, embeddings->dtype(), Device::cpu());
    embed(rows, *embeddings);
    batch.embedded = rows.to(device);
    synchronize(device);
  }
  return batch;
}

BatchBuilder::Extent BatchBuilder::extent(Device device, const Tensor* embeddings) const {
  Extent extent{};
  placed(
      [&]<class T>(const std::vector<T>& values) {
        extent.sent += aligned(static_cast<int64_t>(values.size() * sizeof(T)));
        extent.rows = static_cast<int64_t>(values.size());  // the last array is as long as nll
        return Tensor();
      },
      device);
  if (embeddings != nullptr)
    extent.sent += aligned(embedded_shape(*embeddings).numel() *
                           static_cast<int64_t>(size_of(embeddings->dtype())));
  extent.total = extent.sent + aligned(extent.rows * static_cast<int64_t>(sizeof(float)));
  return extent;
}

void BatchBuilder::reserve(BatchBuffer& buffer, const Tensor* embeddings) const {
  buffer.reserve(extent(buffer.device(), embeddings).total);
}

Batch BatchBuilder::to(BatchBuffer& buffer, const Tensor* embeddings) const {
  const Extent own = extent(buffer.device(), embeddings);
  // What was reserved for the largest batch seldom grows; where it does, not every time.
  if (own.total > buffer.bytes_) buffer.reserve(own.total + own.total / 2);
  int64_t offset = 0;
  const auto take = [&](const Shape& shape, DType dtype) {
    const Tensor view = buffer.block_.bytes_at(offset, shape, dtype);
    offset += aligned(view.bytes());
    return view;
  };
  Batch batch = placed(
      [&]<class T>(const std::vector<T>& values) {
        if (!values.empty())
          std::memcpy(buffer.host() + offset, values.data(), values.size() * sizeof(T));
        return take({static_cast<int64_t>(values.size())}, dtype_of<T>());
      },
      buffer.device());
  if (embeddings != nullptr) {
    const Shape shape = embedded_shape(*embeddings);
    embed(view_of(buffer.host() + offset, shape, embeddings->dtype(), Device::cpu()), *embeddings);
    batch.embedded = take(shape, embeddings->dtype());
  }
  if (buffer.device().is_cuda())
    cuda::copy_async(buffer.block_.raw(), buffer.host_, static_cast<size_t>(own.sent));
  buffer.results_ = take({own.rows}, DType::f32);
  return batch;
}

BatchBuffer::~BatchBuffer() {
  if (host_ != nullptr) cuda::release_pinned(host_);
}

void BatchBuffer::reserve(int64_t bytes) {
  if (bytes <= bytes_) return;
  if (host_ != nullptr) cuda::release_pinned(host_);
  host_ = nullptr, bytes_ = 0;
  block_ = results_ = Tensor();
  const MemoryTag tag(Category::workspace);
  const MemoryName name("batch");
  block_ = Tensor::empty({bytes}, DType::u8, device_);
  if (device_.is_cuda()) {
    host_ = static_cast<char*>(cuda::allocate_pinned(static_cast<size_t>(bytes)));
    if (host_ == nullptr)
      fail("{} of page-locked host memory for a batch could not be had", format_bytes(bytes));
  }
  bytes_ = bytes;
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
