#include "nn/batch.h"

#include <algorithm>

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

Batch BatchBuilder::to(Device device) const {
  const auto place = [&]<class T>(const std::vector<T>& values) {
    return Tensor::from_vector(values, {static_cast<int64_t>(values.size())}, device);
  };
  Batch batch;
  batch.ids = place(ids_);
  batch.positions = place(positions_);
  batch.examples = place(examples_);
  batch.cu_seqlens = place(cu_seqlens_);
  batch.max_length = max_length_;
  batch.loss_rows = place(loss_rows_);
  batch.labels = place(labels_);
  batch.scale = place(scale_);
  batch.segments = segments_;
  return batch;
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
