#include <algorithm>

#include "cuda/initcheck.cuh"
#include "cuda/nf4_linear_hopper.cuh"
#include "quant/nf4_linear.h"

namespace qlab::cuda {
namespace hopper {
namespace {

struct Matrix16 {
  void* data;
  int64_t rows, cols, pitch;
};

/// Boxes of 64 columns.
CUtensorMap box_map(const Matrix16& x, int rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(x.cols), static_cast<cuuint64_t>(x.rows)};
  const cuuint64_t pitch = static_cast<cuuint64_t>(x.pitch) * sizeof(bf16);
  const cuuint32_t box[] = {chunk_width, static_cast<cuuint32_t>(rows)};
  return tensor_map("nf4_matmul", x.data, sizes, &pitch, box);
}

struct Nf4Matrix {
  const uint8_t* codes;
  Scales scales;
  int64_t rows, cols;
};

/// Copies of codes, as elements of two bytes.
template <class P>
CUtensorMap code_map(const Nf4Matrix& w) {
  constexpr int weights = 4;  // of an element
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(w.cols / weights),
                              static_cast<cuuint64_t>(w.rows)};
  const cuuint64_t pitch = static_cast<cuuint64_t>(w.cols / 2);
  const cuuint32_t box[] = {P::slot_row_bytes / 2, P::slot_rows};
  return tensor_map(
      "nf4_matmul", const_cast<uint8_t*>(w.codes), sizes, &pitch, box,
      P::slot_row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B);
}

template <class P>
void launch_nf4(const Matrix16& y, const Matrix16& x, const Nf4Matrix& w, const Matrix16& addend,
                int parts, float* sums) {
  static_assert(tells_phases_apart<P>() && P::stages >= P::decoders);
  const auto token_tiles = static_cast<int>(ceil_div<int64_t>(y.rows, P::tokens));
  const bool add = addend.data != nullptr;
  const auto steps = static_cast<int>(x.cols / depth);
  const Nf4Arguments arguments{
      .x = box_map(x, P::box_rows),
      .y = box_map(y, P::group_tokens),
      .addend = box_map(add ? addend : y, P::group_tokens),
      .codes = code_map<P>(w),
      .scales = w.scales,
      .y_data = static_cast<bf16*>(y.data),
      .addend_data = static_cast<const bf16*>(addend.data),
      .sums = reinterpret_cast<float4*>(sums),
      .y_pitch = y.pitch,
      .addend_pitch = addend.pitch,
      .runs_per_row = static_cast<uint32_t>(w.cols / depth),
      .steps = steps,
      .part_steps = ceil_div(steps, parts),
      .parts = parts,
      .rows = static_cast<int>(x.rows),
      .token_tiles = token_tiles,
      .add = add,
  };
  const auto kernel = nf4_linear_kernel<P>;
  constexpr int shared_bytes = sizeof(Nf4Shared<P>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {
      static_cast<unsigned>(P::parts_in_memory ? P::pair : P::pair * parts), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = may_overlap() ? 1 : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of("nf4_matmul", y.cols / P::outputs * token_tiles * parts);
  config.blockDim = P::threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream();
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel, arguments);
  check_launch("nf4_matmul", reinterpret_cast<const void*>(kernel),
               {config.gridDim, config.blockDim.x, config.dynamicSmemBytes});
}

/// The tile that should be fastest: rounds of blocks times what a step of 64 terms took on an H100,
/// in clocks. All give the same bits.
template <bool forward, int pair>
void launch_fastest(const Matrix16& y, const Matrix16& x, const Nf4Matrix& w,
                    const Matrix16& addend, int parts, float* sums) {
  // Few larger clusters find room side by side: of six blocks 17 on the 132 multiprocessors.
  const int64_t at_once = multiprocessor_count() * (pair * parts > 2 ? 3 : 4) / 4;
  const auto time = [&](int tokens, int64_t step) {
    const int64_t blocks = y.cols / Nf4Plan<forward, 128, 64, pair>::outputs *
                           ceil_div<int64_t>(y.rows, tokens) * parts;
    return ceil_div(blocks, at_once) * step;
  };
  const int64_t few = time(64, 814), some = time(128, 934), many = time(256, 1293);
  const int64_t wide = std::min({few, some, many});
  if constexpr (pair == 1) {
    const auto narrow = [&](auto plan, int64_t step) {
      using P = decltype(plan);
      if (parts != 2 || sums == nullptr || y.rows > P::tokens || y.cols / P::outputs > max_meetings)
        return false;
      const int64_t pairs = y.cols / P::outputs / P::pair * parts;
      if (ceil_div(pairs, int64_t{multiprocessor_count() / P::pair}) * step >= wide) return false;
      launch_nf4<P>(y, x, w, addend, parts, sums);
      return true;
    };
    if (y.rows <= 64    ? narrow(Nf4Plan<forward, 64, 64, 2>{}, 640)
        : y.rows <= 128 ? narrow(Nf4Plan<forward, 64, 128, 2>{}, 700)
                        : narrow(Nf4Plan<forward, 64, 256, 2>{}, 880))
      return;
  }
  if (few == wide)
    return launch_nf4<Nf4Plan<forward, 128, 64, pair>>(y, x, w, addend, parts, nullptr);
  if (some == wide)
    return launch_nf4<Nf4Plan<forward, 128, 128, pair>>(y, x, w, addend, parts, nullptr);
  launch_nf4<Nf4Plan<forward, 128, 256, pair>>(y, x, w, addend, parts, nullptr);
}

/// Pairs that share rows of x are faster by 1 to 8 %, but two parts each would make clusters of
/// four, of which 30 at once leave twelve multiprocessors without work.
template <bool forward>
void multiply_nf4(const Matrix16& y, const Matrix16& x, const Nf4Matrix& w, const Matrix16& addend,
                  int wanted, float* sums) {
  const auto steps = static_cast<int>(x.cols / depth);
  const int parts = ceil_div(steps, ceil_div(steps, wanted));  // none is empty
  QLAB_CHECK(parts <= most_parts, "[nf4_matmul] {} parts of a sum, at most {}", parts, most_parts);
  const auto multiply = parts == 2 ? launch_fastest<forward, 1> : launch_fastest<forward, 2>;
  multiply(y, x, w, addend, parts, sums);
}

Matrix16 matrix_of(const Tensor& x) {
  return {x.raw(), x.rows(), x.cols(), x.rows() > 1 ? x.pitch() : x.cols()};
}

/// False where this file was compiled for other architectures alone: then the body is empty.
bool nf4_kernels_present() {
  static const bool present = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, nf4_linear_kernel<Nf4Plan<true, 128, 256, 2>>),
          "cudaFuncGetAttributes");
    return attributes.numRegs > 64;
  }();
  return present;
}

}  // namespace
}  // namespace hopper

bool nf4_wgmma_available() {
  return device_count() == 0 || (hopper::device_supported() && hopper::nf4_kernels_present());
}

void nf4_matmul_wgmma(const Tensor& y, const Tensor& x, const Nf4Tensor& w, Op op, int parts,
                      const Tensor& addend, const Tensor& workspace) {
  const auto multiply =
      op == Op::transpose ? hopper::multiply_nf4<true> : hopper::multiply_nf4<false>;
  if (!addend.defined() || addend.raw() != y.raw()) fill_for_initcheck(y);
  multiply(hopper::matrix_of(y), hopper::matrix_of(x),
           {w.codes.data<uint8_t>(), scales_of(w), w.shape[0], w.shape[1]},
           addend.defined() ? hopper::matrix_of(addend) : hopper::Matrix16{}, parts,
           workspace.defined() ? workspace.data<float>() : nullptr);
}

}  // namespace qlab::cuda
