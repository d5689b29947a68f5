#include "nn/adapter_products.h"

#include "core/ops/gemm.h"
#include "core/profile.h"
#include "nn/adapter_plan.h"
#include "nn/fold.h"

namespace qlab {
namespace {

int64_t width_of(const AdapterPart& part) {
  return (part.r() + fold_step - 1) / fold_step * fold_step;
}

/// Shapes and pitches that the GPU's kernels take: rows and modules begin at multiples of 16 bytes,
/// and the parts lie side by side.
template <class... Tensors>
bool on_tensor_cores(const AdapterRows& rows, int64_t max_rank, const Tensor& first,
                     const Tensors&... tensors) {
  if (first.device().target != DeviceType::cuda || first.dtype() != DType::bf16 ||
      rows.modules().size() > max_kernel_parts || first.dim(1) % 8 != 0 || first.pitch() % 8 != 0 ||
      ((tensors.dim(1) % 8 != 0 || tensors.pitch() % 8 != 0) || ...))
    return false;
  const int64_t width = width_of(rows.parts.front());
  for (size_t i = 0; i < rows.parts.size(); ++i) {
    const AdapterPart& part = rows.parts[i];
    if (part.r() > max_rank || width_of(part) != width ||
        part.column != static_cast<int64_t>(i) * width || part.row % 8 != 0 || part.out() % 8 != 0)
      return false;
  }
  return first.device().capability != 0 || cuda::adapter_kernels_present();
}

Tensor workspace_of(int64_t bytes, Device device) {
  const MemoryTag tag(Category::workspace);
  const MemoryName name("workspace of adapters");
  return Tensor::empty({bytes}, DType::u8, device);
}

/// The rows of a segment.
Tensor own_rows(const Tensor& x, const AdapterRows& rows, int64_t segment) {
  const int64_t count = x.dim(0) / rows.segments;
  return x.slice_rows(segment * count, (segment + 1) * count);
}
/// And its columns.
Tensor own_block(const Tensor& s, const AdapterRows& rows, int64_t segment) {
  const int64_t count = s.dim(1) / rows.segments;
  return own_rows(s, rows, segment).slice_cols(segment * count, (segment + 1) * count);
}

void output_gradient_of_part(const Tensor& dy, const Tensor& s, const AdapterPart& part) {
  gemm(part.lora->db, dy.slice_cols(part.row, part.row + part.out()), Op::transpose,
       columns(s, part), Op::none, part.lora->scale, 1.0f, {}, SplitK::allowed);
}

/// ds and dB, where it can be in one pass over dy.
void output_gradients(const Tensor& ds, const Tensor& dy, const Tensor& b, const Tensor& s,
                      const AdapterRows& rows) {
  const Device device = dy.device();
  if (on_tensor_cores(rows, max_kernel_rank, dy, b, s, ds)) {
    const Tensor workspace =
        workspace_of(cuda::adapter_out_workspace(dy.dim(0) / rows.segments, rows), device);
    const OpScope scope("adapter_backward", device, {0, bytes_of_all(dy, b, s, ds)});
    if (!device.is_meta()) cuda::adapter_out_gradients(ds, dy, b, s, rows, workspace);
    return;
  }
  std::vector<Factors> products;
  const int64_t width = b.dim(1) / rows.segments;
  for (int64_t i = 0; i < rows.segments; ++i)
    products.push_back(
        {own_block(ds, rows, i), own_rows(dy, rows, i), b.slice_cols(i * width, (i + 1) * width)});
  gemm_each(products, Op::none, Op::none, SplitK::allowed);
  for (int64_t i = 0; i < rows.segments; ++i)
    for (const AdapterPart& part : rows.of(i))
      output_gradient_of_part(own_rows(dy, rows, i), own_rows(s, rows, i), part);
}

void input_gradient_of_part(const Tensor& ds, const Tensor& x, const AdapterPart& part,
                            const AdapterRows& rows) {
  gemm(part.lora->da, columns(ds, part), Op::transpose, dropped(x, part, rows), Op::none, 1.0f,
       1.0f, {}, SplitK::allowed);
}

/// dA, where it can be of all modules in one pass over x.
void input_weight_gradients(const Tensor& ds, const Tensor& x, const AdapterRows& rows) {
  const Device device = x.device();
  const bool dropout = rows.dropout() > 0;
  if ((rows.parts.size() == 1 && !dropout) || !on_tensor_cores(rows, max_dropout_rank, x, ds)) {
    for (int64_t i = 0; i < rows.segments; ++i)
      for (const AdapterPart& part : rows.of(i))
        input_gradient_of_part(own_rows(ds, rows, i), own_rows(x, rows, i), part, rows);
    return;
  }
  if (dropout) {
    const Tensor workspace =
        workspace_of(cuda::adapter_in_workspace(x.dim(0), x.dim(1), rows), device);
    const OpScope scope("adapter with dropout", device, {0, bytes_of_all(x, ds)});
    if (!device.is_meta()) cuda::adapter_in_gradients(ds, x, rows, workspace);
    return;
  }
  Tensor da;
  {
    const MemoryTag tag(Category::workspace);
    const MemoryName name("dA of a group");
    da = Tensor::empty({ds.dim(1), x.dim(1)}, DType::f32, device);
  }
  // One module alone has its product without the columns beyond its rank.
  const int64_t width = ds.dim(1) / rows.segments;
  const int64_t used = rows.modules().size() == 1 ? rows.modules().front().r() : width;
  std::vector<Factors> products;
  for (int64_t i = 0; i < rows.segments; ++i)
    products.push_back({da.slice_rows(i * width, i * width + used),
                        own_block(ds, rows, i).slice_cols(0, used), own_rows(x, rows, i)});
  gemm_each(products, Op::transpose, Op::none, SplitK::allowed);
  const OpScope scope("adapter_backward", device, {0, 3 * bytes_of_all(da)});
  if (!device.is_meta()) cuda::adapter_add_da(da, rows);
}

void check_segments(const char* op, const Tensor& s, const AdapterRows& rows) {
  QLAB_CHECK(rows.segments == 1 || (rows.dropout() == 0 && rows.segments <= max_segments &&
                                    std::ssize(rows.parts) % rows.segments == 0 &&
                                    s.dim(0) % rows.segments == 0 && s.dim(1) % rows.segments == 0),
             "[{}] {} segments of {} parts, dropout {}, share {}: at most {} of equal rows and "
             "parts, without dropout",
             op, rows.segments, rows.parts.size(), rows.dropout(), s.str(), max_segments);
}

}  // namespace

Tensor columns(const Tensor& s, const AdapterPart& part) {
  return s.slice_cols(part.column, part.column + part.r());
}

Tensor dropped(const Tensor& x, const AdapterPart& part, const AdapterRows& rows) {
  if (part.dropout.p == 0) return x;
  return dropout(x, rows.examples, rows.positions, part.dropout);
}

void adapter_forward(const Tensor& s, const Tensor& x, const Tensor& a, const AdapterRows& rows) {
  check_segments("adapter_forward", s, rows);
  check_shape("adapter_forward", "s", s, {x.dim(0), a.dim(0)});
  check_shape("adapter_forward", "a", a, {s.dim(1), x.dim(1)});
  if (rows.dropout() == 0) {
    std::vector<Factors> products;
    const int64_t width = a.dim(0) / rows.segments;
    for (int64_t i = 0; i < rows.segments; ++i)
      products.push_back(
          {own_block(s, rows, i), own_rows(x, rows, i), a.slice_rows(i * width, (i + 1) * width)});
    return gemm_each(products, Op::none, Op::transpose, SplitK::allowed);
  }
  if (on_tensor_cores(rows, max_dropout_rank, x, s, a)) {
    const Device device = x.device();
    const Tensor workspace =
        workspace_of(cuda::adapter_forward_workspace(x.dim(0), x.dim(1), rows), device);
    const OpScope scope("adapter with dropout", device, {0, bytes_of_all(x, s, a)});
    if (!device.is_meta()) cuda::adapter_forward(s, x, a, rows, workspace);
    return;
  }
  for (const AdapterPart& part : rows.parts)
    gemm(columns(s, part), dropped(x, part, rows), Op::none,
         a.slice_rows(part.column, part.column + part.r()), Op::transpose, 1.0f, 0.0f, {},
         SplitK::allowed);
}

void adapter_backward(const Tensor& ds, const Tensor& dy, const Tensor& b, const Tensor& s,
                      const Tensor& x, const AdapterRows& rows) {
  check_shape("adapter_backward", "ds", ds, {dy.dim(0), b.dim(1)});
  check_segments("adapter_backward", ds, rows);
  check_shape("adapter_backward", "s", s, ds.shape());
  check_shape("adapter_backward", "b", b, {dy.dim(1), ds.dim(1)});
  output_gradients(ds, dy, b, s, rows);
  input_weight_gradients(ds, x, rows);
}

void adapter_gradients(const Tensor& ds, const Tensor& dy, const Tensor& s, const Tensor& x,
                       const AdapterRows& rows) {
  for (const AdapterPart& part : rows.parts) {
    output_gradient_of_part(dy, s, part);
    input_gradient_of_part(ds, x, part, rows);
  }
}

void adapter_input_gradient(const Tensor& dx, const Tensor& ds, const Tensor& a,
                            const AdapterRows& rows) {
  if (a.defined() && rows.dropout() > 0 && on_tensor_cores(rows, max_dropout_rank, dx, ds, a)) {
    const OpScope scope("adapter with dropout", dx.device(), {0, bytes_of_all(dx, dx, ds, a)});
    if (!dx.device().is_meta()) cuda::adapter_input_gradient(dx, ds, a, rows);
    return;
  }
  for (const AdapterPart& part : rows.parts) {
    const Tensor own = columns(ds, part);
    if (part.dropout.p == 0)
      gemm(dx, own, Op::none, part.lora->a_compute, Op::none, 1.0f, 1.0f);
    else
      dropout_add(dx, matmul_nn(own, part.lora->a_compute), rows.examples, rows.positions,
                  part.dropout);
  }
}

namespace cuda {

int64_t adapter_forward_workspace(int64_t tokens, int64_t k, const AdapterRows& rows) {
  const int64_t parts = std::ssize(rows.parts), width = width_of(rows.parts.front());
  const int64_t splits = adapter_plan::ceil_div(k, adapter_plan::down_split_cols(tokens, k, parts));
  return parts * splits * tokens * width * static_cast<int64_t>(sizeof(float));
}

int64_t adapter_out_workspace(int64_t tokens, const AdapterRows& rows) {
  using namespace adapter_plan;
  const int64_t tiles = out_tiles(rows.modules()), width = width_of(rows.parts.front());
  const int64_t splits = ceil_div(tokens, out_split_rows(tokens, tiles));
  int64_t rows_of_sums = tiles * tokens;
  for (const AdapterPart& part : rows.modules()) rows_of_sums += splits * part.out();
  return rows.segments * rows_of_sums * width * static_cast<int64_t>(sizeof(float));
}

int64_t adapter_in_workspace(int64_t tokens, int64_t k, const AdapterRows& rows) {
  const int64_t parts = std::ssize(rows.parts), width = width_of(rows.parts.front());
  const int64_t splits =
      adapter_plan::ceil_div(tokens, adapter_plan::in_split_rows(tokens, k, parts));
  return parts * splits * width * k * static_cast<int64_t>(sizeof(float));
}

}  // namespace cuda
}  // namespace qlab
