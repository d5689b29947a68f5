// A micro-batch: the sequences of one or several trials, concatenated along tokens without padding.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/tensor.h"

namespace qlab {

class Adapter;

/// Rows of logits that exist at a time.
inline constexpr int64_t loss_chunk = 512;

/// A sequence of tokens and where it comes from. labels[i] is what position i should be, -100 where
/// nothing is trained; position i predicts labels[i + 1].
struct Sequence {
  std::span<const int32_t> ids, labels;
  int64_t example = 0;  // running index, part of the key of its dropout masks
};

/// The rows of one trial, and the adapter they meet.
struct Segment {
  int64_t begin = 0, end = 0;            // token rows
  int64_t loss_begin = 0, loss_end = 0;  // rows of nll
  const Adapter* adapter = nullptr;      // none: the base alone
  bool dropout = false;                  // on while training
};

struct Batch {
  Tensor ids;         // i32 [T]
  Tensor embedded;    // [T, hidden], where the embeddings lie on the host; otherwise undefined
  Tensor positions;   // i32 [T], from 0 in every sequence
  Tensor examples;    // i64 [T]
  Tensor cu_seqlens;  // i32 [sequences + 1]
  int64_t max_length = 0;
  /// i32 [R]: rows of T whose next token is trained; for a GPU R is padded to full chunks, with -1.
  Tensor loss_rows;
  Tensor labels;  // i32 [R]
  Tensor scale;   // fp32 [R]: the loss is sum_r scale_r nll_r; undefined when no gradient is wanted
  std::vector<Segment> segments;
  /// Generation: one segment, no gradient. Products may take kernels for as few rows as these.
  bool generating = false;
};

/// Rows that an adapter's products take at a time, from its segment's first: sums over tokens have
/// this partition, however a step is planned.
inline constexpr int64_t row_unit = 8192;

/// Pieces of a batch of at most row_unit rows, made of whole units of its segments. A unit of one
/// row joins the unit before it: of products with one row no bits are promised (docs/design.md).
struct RowChunk {
  int64_t begin, end;
};
std::vector<RowChunk> row_chunks(const Batch& batch);
/// What row-wise modules need of these rows: positions, examples, segments.
Batch rows_of(const Batch& batch, const RowChunk& chunk);

/// Where one batch after another lies on a device, and for a GPU its page-locked twin on the host:
/// placing a batch is one copy. The previous batch must have been used up.
class BatchBuffer {
 public:
  explicit BatchBuffer(Device device) : device_(device) {}
  ~BatchBuffer();
  BatchBuffer(const BatchBuffer&) = delete;
  BatchBuffer& operator=(const BatchBuffer&) = delete;

  Device device() const { return device_; }
  /// Changes when the buffer grows.
  const void* base() const { return block_.defined() ? block_.raw() : nullptr; }
  /// fp32 [rows] behind the batch, for what comes back: the nll of its rows.
  Tensor results() const { return results_; }
  /// Their values, once everything issued has run.
  std::vector<float> read_results() const;

 private:
  friend class BatchBuilder;
  void reserve(int64_t bytes);
  char* host() const { return host_ != nullptr ? host_ : static_cast<char*>(block_.raw()); }

  Device device_;
  Tensor block_, results_;
  char* host_ = nullptr;
  int64_t bytes_ = 0;
};

/// Builds a batch on the host, then places it on a device, or on meta to plan a step of its shape.
class BatchBuilder {
 public:
  /// The sequences of one trial. `scale` is the weight of each trained token's loss.
  void add(const std::vector<Sequence>& sequences, const Adapter* adapter, bool dropout,
           float scale);
  /// `embeddings`: the table whose rows come along (Batch::embedded), nullptr for none. On meta:
  /// tensors that nobody owns.
  Batch to(Device device, const Tensor* embeddings = nullptr) const;
  /// The same in `buffer`: equal shapes get equal addresses.
  Batch to(BatchBuffer& buffer, const Tensor* embeddings = nullptr) const;
  /// Makes room for a batch of this shape.
  void reserve(BatchBuffer& buffer, const Tensor* embeddings = nullptr) const;
  int64_t max_length() const { return max_length_; }
  int64_t tokens() const { return static_cast<int64_t>(ids_.size()); }
  int64_t loss_tokens() const { return static_cast<int64_t>(loss_rows_.size()); }
  /// Two batches with equal keys run the same operations on the same shapes.
  std::vector<int64_t> shape_key() const;

 private:
  /// Bytes of what is sent, one array behind the other, and with the nll behind them.
  struct Extent {
    int64_t sent, rows, total;
  };
  Extent extent(Device device, const Tensor* embeddings) const;
  Shape embedded_shape(const Tensor& embeddings) const { return {tokens(), embeddings.dim(1)}; }
  void embed(const Tensor& rows, const Tensor& embeddings) const;
  template <class Place>
  Batch placed(const Place& place, Device device) const;

  std::vector<int32_t> ids_, positions_, cu_seqlens_{0}, loss_rows_, labels_;
  std::vector<int64_t> examples_;
  std::vector<float> scale_;
  int64_t max_length_ = 0;
  std::vector<Segment> segments_;
};

/// Positions of a sequence whose next token is trained.
int64_t trained_tokens(const Sequence& sequence);

}  // namespace qlab
