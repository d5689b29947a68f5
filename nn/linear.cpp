#include "nn/linear.h"

#include <algorithm>

#include "core/ops/add.h"
#include "core/ops/copy.h"
#include "core/ops/gemm.h"
#include "core/profile.h"
#include "nn/adapter_products.h"
#include "nn/fold.h"

namespace qlab {
namespace {

/// The adapters of one segment, for at most row_unit of its rows, or of several that compute
/// together. Column 0 is that of the first segment; those of the parts count from the segment's
/// own.
struct SegmentParts {
  int64_t begin, end;  // token rows
  int64_t column, width;
  std::vector<AdapterPart> parts;
  int64_t segments = 1;

  bool dropout() const { return parts.front().dropout.p > 0; }
  AdapterRows rows(const Batch& batch) const {
    if (!dropout()) return {parts, {}, {}, segments};
    return {parts, batch.examples.slice_rows(begin, end), batch.positions.slice_rows(begin, end)};
  }
};

struct Layout {
  std::vector<SegmentParts> segments;  // those with an adapter on the group, in units of rows
  std::vector<SegmentParts> runs;      // of those, neighbours together
  int64_t width = 0;                   // columns in all
  int64_t widest = 0;                  // of one segment

  /// Of what a recomputed layer could keep s saves the most time per byte, unless it is wide: to
  /// make it again x is read once, 27 us of an H100 for 67 MB, or 71 with dropout; a layer's other
  /// tensors save 0.4 ms for as many bytes.
  SlotPolicy keeps_s(int64_t k) const {
    return widest * 16 <= k ? SlotPolicy::keep : SlotPolicy::recompute;
  }
};

/// Whether `next` may compute with those of `run`: equal rows and modules, one after another.
bool together(const SegmentParts& run, const SegmentParts& next) {
  const int64_t rows = (run.end - run.begin) / run.segments;
  const auto alike = [](const AdapterPart& a, const AdapterPart& b) {
    return a.row == b.row && a.column == b.column && a.r() == b.r() && a.out() == b.out();
  };
  return run.segments < max_segments && !run.dropout() && !next.dropout() &&
         next.begin == run.end && next.end - next.begin == rows &&
         next.column == run.column + run.width && next.width == run.width / run.segments &&
         std::equal(next.parts.begin(), next.parts.end(), run.parts.begin(),
                    run.parts.begin() + std::ssize(run.parts) / run.segments, alike);
}

std::vector<SegmentParts> runs_of(const std::vector<SegmentParts>& segments) {
  std::vector<SegmentParts> runs;
  for (const SegmentParts& next : segments) {
    if (runs.empty() || !together(runs.back(), next)) {
      runs.push_back(next);
      continue;
    }
    SegmentParts& run = runs.back();
    for (AdapterPart part : next.parts) {
      part.column += run.width;
      run.parts.push_back(part);
    }
    run.end = next.end;
    run.width += next.width;
    ++run.segments;
  }
  return runs;
}

Layout layout_of(const LinearGroup& group, const Batch& batch) {
  Layout layout;
  for (const Segment& s : batch.segments) {
    if (s.adapter == nullptr || s.end == s.begin) continue;
    SegmentParts own{s.begin, s.end, layout.width, 0, {}};
    const float p = s.dropout ? static_cast<float>(s.adapter->spec().dropout) : 0;
    int64_t row = 0;
    for (const Linear& member : group.members) {
      if (const LoraModule* lora = s.adapter->find(member.index)) {
        own.parts.push_back({lora, row, own.width, {lora->dropout_key, p}});
        own.width += (lora->a.dim(0) + fold_step - 1) / fold_step * fold_step;
      }
      row += member.weight.out_features();
    }
    if (own.parts.empty()) continue;
    layout.width += own.width;
    layout.widest = std::max(layout.widest, own.width);
    for (own.begin = s.begin; own.begin < s.end; own.begin = own.end) {
      own.end = std::min(own.begin + row_unit, s.end);
      layout.segments.push_back(own);
    }
  }
  layout.runs = runs_of(layout.segments);
  return layout;
}

// ---- folded

/// x itself when it has room for `width` more columns, otherwise a copy that has.
Tensor with_room(const Tensor& x, int64_t width) {
  const int64_t cols = x.dim(1) + width;
  if (width == 0 || x.pitch() >= cols) return x;
  Tensor y = Tensor::with_tail(x.dim(0), x.dim(1), width, x.dtype(), x.device());
  copy(y, x);
  return y;
}

/// The block [N + R, K + R] of nn/fold.h; without `expand` W is left out, and with no adapter
/// either there is none. Held, it may have the adapters already.
Tensor folded_block(const LinearGroup& group, const Layout& layout, bool expand, bool has_adapters,
                    DType dtype, Device device) {
  const int64_t n = group.out_features(), k = group.in_features(), width = layout.width;
  if (!expand && width == 0) return {};
  Tensor block = group.resident;
  if (block.defined()) {
    QLAB_CHECK(block.dim(0) >= n + width && block.dim(1) >= k + width,
               "[linear] {} of {} held has no room for adapters of width {}",
               group.members.front().name, block.str(), width);
  } else {
    const MemoryTag tag(Category::workspace);
    const MemoryName name("weights expanded");
    block = Tensor::with_tail(n + width, k, width, dtype, device).widened(k + width);
    int64_t row = 0;
    for (const Linear& member : group.members) {
      const int64_t end = row + member.weight.out_features();
      if (expand) member.weight.expand(block.slice_rows(row, end).slice_cols(0, k));
      row = end;
    }
  }
  block = block.slice_rows(0, n + width).slice_cols(0, k + width);
  if (width == 0 || (has_adapters && group.resident.defined())) return block;
  std::vector<FoldPart> parts;
  for (const SegmentParts& segment : layout.segments)
    for (const AdapterPart& part : segment.parts)
      if (parts.empty() ||
          parts.back().column < segment.column + part.column)  // once for all units
        parts.push_back(
            {part.lora->a, part.lora->b, part.lora->scale, part.row, segment.column + part.column});
  QLAB_CHECK(static_cast<int64_t>(parts.size()) <= max_fold_parts,
             "[linear] {} adapters of trials that train together on {}, at most {} fit: set a "
             "smaller parallel.trials_per_gpu",
             parts.size(), group.members.front().name, max_fold_parts);
  // Weights held are real in a dry run too.
  if (device.is_meta())
    check_foldable(block, width);
  else
    fold_adapters(block, width, parts);
  return block;
}

/// The tail of x: zeros wherever a row's own adapter does not write.
Tensor cleared_tail(const Tensor& x, int64_t k, const Layout& layout, bool written) {
  const Tensor tail = x.slice_cols(k, k + layout.width);
  if (!written) fill_zero(tail);
  return tail;
}

/// The rows of a segment, or of a run, and its columns, of all that stand side by side, or of its
/// own alone.
Tensor own_columns(const Tensor& tail, const SegmentParts& segment) {
  return tail.slice_rows(segment.begin, segment.end)
      .slice_cols(segment.column, segment.column + segment.width);
}
Tensor packed_columns(const Tensor& s, const SegmentParts& segment) {
  return s.slice_rows(segment.begin, segment.end).slice_cols(0, segment.width);
}

/// Whether one adapter covers all rows and columns.
bool one_adapter(const Layout& layout, int64_t rows) {
  const SegmentParts &first = layout.segments.front(), &last = layout.segments.back();
  return first.begin == 0 && last.end == rows && first.column == last.column &&
         first.width == layout.width;
}
/// And a product without dropout writes them all.
bool all_written(const Layout& layout, int64_t rows) {
  return one_adapter(layout, rows) && !layout.segments.front().dropout();
}

/// Whether every segment has dropout, of some.
bool all_dropped(const Layout& layout) {
  return !layout.segments.empty() && std::all_of(layout.segments.begin(), layout.segments.end(),
                                                 [](const auto& s) { return s.dropout(); });
}

/// A of a segment, [width, K], and scale B, [N, width], in the block.
Tensor stacked_a(const Tensor& block, const SegmentParts& segment, int64_t n, int64_t k) {
  return block.slice_rows(n + segment.column, n + segment.column + segment.width).slice_cols(0, k);
}
Tensor stacked_b(const Tensor& block, const SegmentParts& segment, int64_t n, int64_t k) {
  return block.slice_rows(0, n).slice_cols(k + segment.column, k + segment.column + segment.width);
}

void copy_s(const Tensor& to, const Tensor& from) {
  const OpScope scope("copy of s", to.device(), {0, bytes_of_all(to, from)});
  copy(to, from);
}

/// s = A dropout(x) into the tail of x [T, K + R], or from where it was `kept`.
void fill_s(const Tensor& x, const Tensor& block, const Layout& layout, const LinearGroup& group,
            const Batch& batch, const Tensor& kept) {
  const int64_t k = group.in_features(), n = group.out_features();
  // Rows of A between the parts are zero, so that a product over all of them clears the columns.
  const bool written =
      kept.defined() ? one_adapter(layout, x.dim(0)) : all_written(layout, x.dim(0));
  const Tensor tail = cleared_tail(x, k, layout, written);
  if (kept.defined()) {
    for (const SegmentParts& segment : layout.segments)
      copy_s(own_columns(tail, segment), packed_columns(kept, segment));
    return;
  }
  for (const SegmentParts& run : layout.runs)
    adapter_forward(own_columns(tail, run), x.slice_rows(run.begin, run.end).slice_cols(0, k),
                    stacked_a(block, run, n, k), run.rows(batch));
}

/// s out of the tail of x, that of each segment from column 0 on.
Tensor copy_of_s(const Tensor& x, const Layout& layout, int64_t k) {
  const Tensor s = Tensor::empty({x.dim(0), layout.widest}, x.dtype(), x.device());
  const Tensor tail = x.slice_cols(k, k + layout.width);
  for (const SegmentParts& segment : layout.segments)
    copy_s(packed_columns(s, segment), own_columns(tail, segment));
  return s;
}

Tensor folded_backward(const Tensor& incoming, Node& node, const LinearGroup& group,
                       const Batch& batch, const Layout& layout, bool has_adapters, Tensor& g) {
  const int64_t n = group.out_features(), k = group.in_features();
  // With dropout ds A is added behind a mask: where all tokens have it, ds has no part in dx.
  const int64_t width = all_dropped(layout) ? 0 : layout.width;
  g = with_room(incoming, width);
  Tensor block = node.take_scratch();
  if (!block.defined())
    block = folded_block(group, layout, node.needs(0), has_adapters, g.dtype(), g.device());
  const Tensor wide = width > 0 ? g.widened(n + width) : g;
  std::vector<Tensor> apart;  // ds of segments with dropout
  if (layout.width > 0) {
    const Tensor x = node.take("linear.x");  // dx may lie where it lay
    const Tensor tail =
        width > 0 ? cleared_tail(wide, n, layout, all_written(layout, g.dim(0))) : Tensor();
    const Tensor tail_of_x = x.slice_cols(k, k + layout.width);
    for (const SegmentParts& run : layout.runs) {
      Tensor ds = run.dropout()
                      ? Tensor::empty({run.end - run.begin, run.width}, g.dtype(), g.device())
                      : own_columns(tail, run);
      adapter_backward(ds, g.slice_rows(run.begin, run.end), stacked_b(block, run, n, k),
                       own_columns(tail_of_x, run),
                       x.slice_rows(run.begin, run.end).slice_cols(0, k), run.rows(batch));
      if (run.dropout()) apart.push_back(std::move(ds));
    }
  }
  if (!node.needs(0)) return {};
  const Tensor dx = matmul_nn(wide, block.slice_rows(0, n + width).slice_cols(0, k));
  size_t next = 0;
  for (const SegmentParts& run : layout.runs)
    if (run.dropout())
      adapter_input_gradient(dx.slice_rows(run.begin, run.end), apart[next++],
                             stacked_a(block, run, n, k), run.rows(batch));
  return dx;
}

// ---- separate

/// For s or ds. Products of the library read whole vectors of a row, with columns beyond a rank
/// that nobody writes and no result depends on: for the sanitizer's sake they are written where
/// every tensor is allocated by itself.
Tensor rank_columns(int64_t rows, int64_t width, const Tensor& like) {
  const Tensor s = Tensor::empty({rows, width}, like.dtype(), like.device());
  if (!StepMemory::planned()) fill_zero(s);
  return s;
}

Tensor separate_forward(const Tensor& x, const Tensor& y, const LinearGroup& group,
                        const Batch& batch, const Layout& layout, const Tensor& residual,
                        bool wanted, const Tensor& kept) {
  int64_t row = 0;
  for (const Linear& member : group.members) {
    if (!wanted) break;
    const int64_t end = row + member.weight.out_features();
    gemm(y.slice_cols(row, end), x, Op::none, member.weight.dense(x.dtype(), x.device()),
         Op::transpose, 1.0f, residual.defined() ? 1.0f : 0.0f,
         residual.defined() ? residual.slice_cols(row, end) : Tensor());
    row = end;
  }
  if (layout.width == 0) return {};
  const Tensor s = kept.defined() ? kept : rank_columns(x.dim(0), layout.widest, x);
  for (const SegmentParts& segment : layout.segments)
    for (const AdapterPart& part : segment.parts) {
      const LoraModule& lora = *part.lora;
      const Tensor own = columns(s.slice_rows(segment.begin, segment.end), part);
      if (!kept.defined())
        gemm(own, dropped(x.slice_rows(segment.begin, segment.end), part, segment.rows(batch)),
             Op::none, lora.a_compute, Op::transpose);
      if (!wanted) continue;
      gemm(y.slice_rows(segment.begin, segment.end).slice_cols(part.row, part.row + part.out()),
           own, Op::none, lora.b_compute, Op::transpose, lora.scale, 1.0f);
    }
  return s;
}

Tensor separate_backward(const Tensor& g, const Node& node, const LinearGroup& group,
                         const Batch& batch, const Layout& layout) {
  Tensor dx;
  if (node.needs(0)) {
    dx = Tensor::empty({g.dim(0), group.in_features()}, g.dtype(), g.device());
    int64_t row = 0;
    for (const Linear& member : group.members) {
      const int64_t end = row + member.weight.out_features();
      gemm(dx, g.slice_cols(row, end), Op::none, member.weight.dense(g.dtype(), g.device()),
           Op::none, 1.0f, row == 0 ? 0.0f : 1.0f);
      row = end;
    }
  }
  for (const SegmentParts& segment : layout.segments) {
    const Tensor dy = g.slice_rows(segment.begin, segment.end);
    const Tensor ds = rank_columns(dy.dim(0), segment.width, g);
    for (const AdapterPart& part : segment.parts)
      gemm(columns(ds, part), dy.slice_cols(part.row, part.row + part.out()), Op::none,
           part.lora->b_compute, Op::none, part.lora->scale);
    adapter_gradients(ds, dy, node.saved("linear.s").slice_rows(segment.begin, segment.end),
                      node.saved("linear.x").slice_rows(segment.begin, segment.end),
                      segment.rows(batch));
    if (dx.defined())
      adapter_input_gradient(dx.slice_rows(segment.begin, segment.end), ds, {},
                             segment.rows(batch));
  }
  return dx;
}

// ---- generating

/// The kernels for W of each member, or none where one of them has none.
std::vector<Nf4Kernel> fused_kernels(const LinearGroup& group, const Tensor& x) {
  std::vector<Nf4Kernel> kernels;
  if (group.resident.defined()) return {};
  for (const Linear& member : group.members) {
    const auto kernel = member.weight.fused_kernel(Op::transpose, x.dim(0), x.dtype(), x.device());
    if (!kernel) return {};
    kernels.push_back(*kernel);
  }
  return kernels;
}

/// As separate_forward, by kernels that decode W themselves.
void generating_forward(const Tensor& x, const Tensor& y, const LinearGroup& group,
                        const Layout& layout, const Tensor& residual,
                        const std::vector<Nf4Kernel>& kernels) {
  int64_t row = 0;
  for (size_t i = 0; i < group.members.size(); ++i) {
    const Weight& weight = group.members[i].weight;
    const int64_t end = row + weight.out_features();
    weight.multiply(y.slice_cols(row, end), x, Op::transpose, kernels[i],
                    residual.defined() ? residual.slice_cols(row, end) : Tensor());
    row = end;
  }
  for (const SegmentParts& segment : layout.segments)
    for (const AdapterPart& part : segment.parts) {
      const LoraModule& lora = *part.lora;
      const Tensor s = matmul_nt(x.slice_rows(segment.begin, segment.end), cast(lora.a, x.dtype()));
      gemm(y.slice_rows(segment.begin, segment.end).slice_cols(part.row, part.row + part.out()), s,
           Op::none, cast(lora.b, x.dtype()), Op::transpose, lora.scale, 1.0f);
    }
}

/// Before weights are read.
void fetch(const LinearGroup& group) {
  if (group.stream != nullptr) group.stream->need(group.streamed);
}

void add_biases(const Tensor& y, const LinearGroup& group) {
  int64_t row = 0;
  for (const Linear& member : group.members) {
    const int64_t end = row + member.weight.out_features();
    if (member.bias.defined()) add_bias(y.slice_cols(row, end), member.bias);
    row = end;
  }
}

}  // namespace

int64_t LinearGroup::out_features() const {
  int64_t n = 0;
  for (const Linear& member : members) n += member.weight.out_features();
  return n;
}

int64_t LinearGroup::tail(const Batch& batch) const {
  return folded ? layout_of(*this, batch).width : 0;
}

bool LinearGroup::trains(const Batch& batch) const { return layout_of(*this, batch).width > 0; }

Variable linear(Tape& tape, const Variable& x, const LinearGroup& group, const Batch& batch,
                const Variable& residual) {
  fetch(group);
  const Layout layout = layout_of(group, batch);
  const int64_t n = group.out_features(), width = layout.width;
  // The tail lets an operation write its gradient in place of y.
  const Tensor y =
      Tensor::with_tail(x.value.dim(0), n, group.folded && !residual.value.defined() ? width : 0,
                        x.value.dtype(), x.value.device());
  // Of a region that is run once more only what was recorded may be left out.
  const bool recorded = width > 0 || x.requires_grad() || residual.requires_grad();
  const bool wanted = !recorded || tape.result_wanted();
  const SlotPolicy s_policy = layout.keeps_s(group.in_features());
  const Tensor kept = width > 0 ? tape.kept("linear.s") : Tensor();
  std::vector<Slot> slots;
  const std::vector<Nf4Kernel> kernels =
      batch.generating ? fused_kernels(group, x.value) : std::vector<Nf4Kernel>();
  if (!kernels.empty()) {
    generating_forward(x.value, y, group, layout, residual.value, kernels);
  } else if (group.folded) {
    const Tensor input = with_room(x.value, width);
    const Tensor wide = width > 0 ? input.widened(input.dim(1) + width) : input;
    const Tensor block = folded_block(group, layout, wanted, false, y.dtype(), y.device());
    if (width > 0) fill_s(wide, block, layout, group, batch, kept);
    if (wanted)
      gemm(y, wide, Op::none, block.slice_rows(0, n), Op::transpose, 1.0f,
           residual.value.defined() ? 1.0f : 0.0f, residual.value);
    const bool keep = width > 0 && s_policy == SlotPolicy::keep && tape.keeps_few();
    const Tensor s = keep ? copy_of_s(wide, layout, x.value.dim(1)) : kept;
    if (width > 0) slots = {{"linear.x", wide}, {"linear.s", s, s_policy}};
    if (wanted && !group.resident.defined()) tape.keep_scratch(block);
  } else {
    const Tensor s =
        separate_forward(x.value, y, group, batch, layout, residual.value, wanted, kept);
    if (width > 0) slots = {{"linear.x", x.value}, {"linear.s", s, s_policy}};
  }
  if (wanted) add_biases(y, group);
  Variable result = tape.record(
      "linear", y, {x, residual}, std::move(slots),
      [&group, batch, layout, pass = ++group.passes](const Tensor& g, Node& node) {
        fetch(group);
        Tensor dy = g;  // with room for ds, which the residual's gradient then has too
        const bool latest = group.passes == pass;
        const Tensor dx = group.folded ? folded_backward(g, node, group, batch, layout, latest, dy)
                                       : separate_backward(g, node, group, batch, layout);
        return std::vector<Tensor>{dx, dy};
      },
      width > 0);
  result.tail = group.folded ? std::max(width, residual.tail) : residual.tail;
  return result;
}

}  // namespace qlab
