#include "nn/adapter_products.h"

#include "cuda/adapter_dropout.cuh"
#include "cuda/adapter_out.cuh"
#include "nn/adapter_plan.h"

namespace qlab::cuda {
namespace {

using namespace adapter;

template <class Arguments>
void launch(const char* op, void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
            const Arguments& arguments) {
  constexpr int without_asking = 48 << 10;
  if (shared_bytes > without_asking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          op);
  launch_early(op, kernel,
               LaunchShape{.grid = grid,
                           .threads = static_cast<unsigned>(threads),
                           .shared_bytes = static_cast<size_t>(shared_bytes)},
               arguments);
}

dim3 grid_for(const char* op, int64_t x, int64_t y) {
  return {grid_of(op, x), static_cast<unsigned>(y)};
}

/// Calls f.template operator()<tiles>() with 16 tiles = width.
template <class F>
void dispatch_tiles(const char* op, int64_t width, F&& f) {
  switch (width) {
    case 16:
      return f.template operator()<1>();
    case 32:
      return f.template operator()<2>();
    case 48:
      return f.template operator()<3>();
    case 64:
      return f.template operator()<4>();
    default:
      fail("[{}] adapters of {} columns", op, width);
  }
}

void launch_sums(const char* op, Sums& sums, int64_t segments = 1) {
  int64_t blocks = 0;
  for (int i = 0; i < sums.count; ++i) {
    const Sum& s = sums.sum[i];
    sums.first_block[i] = static_cast<int>(blocks);
    blocks += ceil_div<int64_t>(static_cast<int64_t>(s.rows) * ceil_div(s.cols, 4), sum_threads);
  }
  launch(op, sum_kernel, grid_for(op, blocks, segments), sum_threads, 0, sums);
}

int narrow(int64_t n) { return static_cast<int>(n); }

float factor_of(const AdapterRows& rows) {
  return static_cast<float>(dropout_factor(rows.dropout()));
}
Masks masks_of(const AdapterRows& rows) {
  Masks masks{.example = rows.examples.data<int64_t>(),
              .position = rows.positions.data<int32_t>(),
              .threshold = dropout_threshold(rows.dropout()) << 16,
              .key = {}};
  for (size_t i = 0; i < rows.parts.size(); ++i) masks.key[i] = rows.parts[i].dropout.key;
  return masks;
}

const AdapterPart& part_of(const AdapterRows& rows, int64_t segment, int module) {
  return rows.of(segment)[static_cast<size_t>(module)];
}

/// Adds `planes` of [segments, modules, splits, width, K] to dA of every part.
void add_to_da(const char* op, const AdapterRows& rows, const float* planes, int64_t splits,
               int64_t width, int64_t k, float factor) {
  Sums sums;
  const int64_t modules = std::ssize(rows.modules());
  for (const AdapterPart& part : rows.modules()) {
    Sum& sum = sums.sum[sums.count];
    sum = {.planes = planes,
           .plane = width * k,
           .segment = modules * splits * width * k,
           .to_pitch = k,
           .rows = narrow(part.r()),
           .cols = narrow(k),
           .from_pitch = narrow(k),
           .count = narrow(splits),
           .to = {},
           .factor = {},
           .rounded = false};
    for (int i = 0; i < rows.segments; ++i) {
      sum.to[i] = part_of(rows, i, sums.count).lora->da.data<float>();
      sum.factor[i] = factor;
    }
    ++sums.count;
    planes += splits * width * k;
  }
  launch_sums(op, sums, rows.segments);
}

/// A ring of eight slabs, or of three where shared memory is small (compute capability 8.6, 8.9);
/// bits do not depend on it.
template <int tiles, bool small>
using OutTileFor = OutTile<tiles, 8, 64, small ? 3 : 8>;
static_assert(OutTileFor<1, true>::bytes <= 99 << 10 && OutTileFor<2, true>::bytes <= 99 << 10);
static_assert(OutTileFor<1, true>::cols == adapter_plan::out_tile_cols);
static_assert(down_bytes<4> <= 99 << 10 && InTile<2>::bytes <= 99 << 10 &&
              InTile<3>::bytes <= 99 << 10 && InTile<4>::bytes <= 99 << 10);

int shared_memory_of_a_block() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

template <int tiles>
void launch_out(const char* op, dim3 grid, const Out& arguments) {
  const auto run = [&]<class Tile>() {
    launch(op, out_kernel<Tile>, grid, Tile::threads, Tile::bytes, arguments);
  };
  using Large = OutTileFor<tiles, false>;
  if (Large::bytes <= shared_memory_of_a_block())
    run.template operator()<Large>();
  else
    run.template operator()<OutTileFor<tiles, true>>();
}

}  // namespace

bool adapter_kernels_present() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    cudaGetLastError();
    return true;
  }
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, sum_kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 80;
}

void adapter_forward(const Tensor& s, const Tensor& x, const Tensor& a, const AdapterRows& rows,
                     const Tensor& workspace) {
  const char* const op = "adapter_forward";
  const int64_t t = x.dim(0), k = x.dim(1), parts = std::ssize(rows.parts);
  const int64_t width = s.dim(1) / parts;
  const int64_t split_cols = adapter_plan::down_split_cols(t, k, parts),
                splits = ceil_div(k, split_cols);
  const Down arguments{.x = x.data<bf16>(),
                       .a = a.data<bf16>(),
                       .sums = static_cast<float*>(workspace.raw()),
                       .x_pitch = x.pitch(),
                       .a_pitch = a.pitch(),
                       .rows = narrow(t),
                       .k = narrow(k),
                       .split_cols = narrow(split_cols),
                       .parts = narrow(parts),
                       .masks = masks_of(rows)};
  dispatch_tiles(op, width, [&]<int tiles>() {
    launch(op, down_kernel<tiles>, grid_for(op, ceil_div<int64_t>(t, down_rows) * parts, splits),
           down_threads, down_bytes<tiles>, arguments);
  });
  Sums sums;
  for (int64_t i = 0; i < parts; ++i)
    sums.sum[sums.count++] = {.planes = arguments.sums + i * splits * t * width,
                              .plane = t * width,
                              .segment = 0,
                              .to_pitch = s.pitch(),
                              .rows = narrow(t),
                              .cols = narrow(width),
                              .from_pitch = narrow(width),
                              .count = narrow(splits),
                              .to = {s.data<bf16>() + i * width},
                              .factor = {factor_of(rows)},
                              .rounded = true};
  launch_sums(op, sums);
}

void adapter_out_gradients(const Tensor& ds, const Tensor& dy, const Tensor& b, const Tensor& s,
                           const AdapterRows& rows, const Tensor& workspace) {
  const char* const op = "adapter_backward";
  const int64_t segments = rows.segments, t = dy.dim(0) / segments,
                width = ds.dim(1) / std::ssize(rows.parts), own_width = ds.dim(1) / segments;
  const int64_t tiles = adapter_plan::out_tiles(rows.modules()),
                split_rows = adapter_plan::out_split_rows(t, tiles),
                splits = ceil_div(t, split_rows);
  int64_t db_sums_segment = 0;
  for (const AdapterPart& part : rows.modules()) db_sums_segment += splits * part.out() * width;
  float* const ds_sums = static_cast<float*>(workspace.raw());
  float* db_sums = ds_sums + segments * tiles * t * width;
  Out arguments{.dy = dy.data<bf16>(),
                .s = s.data<bf16>(),
                .ds_sums = ds_sums,
                .dy_pitch = dy.pitch(),
                .s_pitch = s.pitch(),
                .b_pitch = b.pitch(),
                .dy_segment = t * dy.pitch(),
                .s_segment = t * s.pitch() + own_width,
                .ds_sums_segment = tiles * t * width,
                .db_sums_segment = db_sums_segment,
                .rows = narrow(t),
                .split_rows = narrow(split_rows),
                .parts = 0,
                .width = narrow(own_width),
                .part = {}};
  Sums sums;
  int64_t first_tile = 0;
  for (const AdapterPart& part : rows.modules()) {
    const int64_t own = ceil_div(part.out(), adapter_plan::out_tile_cols);
    Sum &of_ds = sums.sum[sums.count], &of_db = sums.sum[sums.count + 1];
    of_ds = {.planes = ds_sums + first_tile * t * width,
             .plane = t * width,
             .segment = tiles * t * width,
             .to_pitch = ds.pitch(),
             .rows = narrow(t),
             .cols = narrow(width),
             .from_pitch = narrow(width),
             .count = narrow(own),
             .to = {},
             .factor = {},
             .rounded = true};
    of_db = {.planes = db_sums,
             .plane = part.out() * width,
             .segment = db_sums_segment,
             .to_pitch = part.r(),
             .rows = narrow(part.out()),
             .cols = narrow(part.r()),
             .from_pitch = narrow(width),
             .count = narrow(splits),
             .to = {},
             .factor = {},
             .rounded = false};
    for (int i = 0; i < segments; ++i) {
      const LoraModule& lora = *part_of(rows, i, arguments.parts).lora;
      of_ds.to[i] = ds.data<bf16>() + i * (t * ds.pitch() + own_width) + part.column;
      of_ds.factor[i] = 1;
      of_db.to[i] = lora.db.data<float>();
      of_db.factor[i] = lora.scale;
    }
    sums.count += 2;
    arguments.part[arguments.parts++] = {.b = b.data<bf16>() + part.row * b.pitch() + part.column,
                                         .db_sums = db_sums,
                                         .row = narrow(part.row),
                                         .out = narrow(part.out()),
                                         .column = narrow(part.column),
                                         .first_tile = narrow(first_tile)};
    first_tile += own;
    db_sums += splits * part.out() * width;
  }
  dim3 grid = grid_for(op, tiles, splits);
  grid.z = static_cast<unsigned>(segments);
  if (width == 16)
    launch_out<1>(op, grid, arguments);
  else
    launch_out<2>(op, grid, arguments);
  launch_sums(op, sums, segments);
}

void adapter_in_gradients(const Tensor& ds, const Tensor& x, const AdapterRows& rows,
                          const Tensor& workspace) {
  const char* const op = "adapter_backward";
  const int64_t t = x.dim(0), k = x.dim(1), parts = std::ssize(rows.parts);
  const int64_t width = ds.dim(1) / parts;
  const int64_t split_rows = adapter_plan::in_split_rows(t, k, parts),
                splits = ceil_div(t, split_rows);
  const In arguments{.x = x.data<bf16>(),
                     .ds = ds.data<bf16>(),
                     .sums = static_cast<float*>(workspace.raw()),
                     .x_pitch = x.pitch(),
                     .ds_pitch = ds.pitch(),
                     .rows = narrow(t),
                     .k = narrow(k),
                     .split_rows = narrow(split_rows),
                     .parts = narrow(parts),
                     .masks = masks_of(rows)};
  dispatch_tiles(op, width, [&]<int tiles>() {
    launch(op, in_kernel<tiles>, grid_for(op, ceil_div<int64_t>(k, in_cols) * parts, splits),
           in_threads, InTile<tiles>::bytes, arguments);
  });
  add_to_da(op, rows, arguments.sums, splits, width, k, factor_of(rows));
}

void adapter_add_da(const Tensor& da, const AdapterRows& rows) {
  add_to_da("adapter_backward", rows, da.data<float>(), 1, da.dim(0) / std::ssize(rows.parts),
            da.dim(1), 1.0f);
}

void adapter_input_gradient(const Tensor& dx, const Tensor& ds, const Tensor& a,
                            const AdapterRows& rows) {
  const char* const op = "adapter_input_gradient";
  const int64_t t = dx.dim(0), k = dx.dim(1), width = ds.dim(1) / std::ssize(rows.parts);
  const int64_t block_rows = std::clamp<int64_t>(adapter_plan::round_up(t / 32, 16), 32, 256);
  Dx arguments{.dx = dx.data<bf16>(),
               .ds = ds.data<bf16>(),
               .a = a.data<bf16>(),
               .dx_pitch = dx.pitch(),
               .ds_pitch = ds.pitch(),
               .a_pitch = a.pitch(),
               .rows = narrow(t),
               .k = narrow(k),
               .block_rows = narrow(block_rows),
               .factor = factor_of(rows),
               .masks = masks_of(rows)};
  const dim3 grid = grid_for(op, ceil_div<int64_t>(k, dx_cols), ceil_div(t, block_rows));
  dispatch_tiles(op, width, [&]<int tiles>() {
    // As many modules at a time as leave a thread enough registers.
    constexpr int most = tiles <= 2 ? 3 : 1;
    const int parts = narrow(std::ssize(rows.parts));
    for (int part = 0; part < parts;) {
      const int now = std::min(most, parts - part);
      const auto run = [&](auto kernel) { launch(op, kernel, grid, dx_threads, 0, arguments); };
      if (now == 1) run(dx_kernel<tiles, 1>);
      if constexpr (most > 1) {
        if (now == 2) run(dx_kernel<tiles, 2>);
        if (now == 3) run(dx_kernel<tiles, 3>);
      }
      part += now;
      arguments.ds += now * width;
      arguments.a += now * width * a.pitch();
      for (int i = 0; i + now < max_parts; ++i)
        arguments.masks.key[i] = arguments.masks.key[i + now];
    }
  });
}

}  // namespace qlab::cuda
