#include "quant/quantize.h"

#include <algorithm>

#include "cuda/divider.cuh"
#include "cuda/early_launch.cuh"
#include "cuda/nf4_decode.cuh"
#include "cuda/reduce.cuh"
#include "quant/nf4.h"

namespace qlab::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps_per_block = threads / warp_size;

// The arithmetic that defines the stored bytes: approximate reciprocal, subnormals flushed to zero.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float multiply_flushed(float a, float b) {
  float y;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/// Scale number `threadIdx.x` of the 256 that belong to a thread block: into `absmax`, and their
/// sum in double into `sums` where that is wanted.
__device__ inline void finish_scales(float* absmax, double* sums, float scale, int64_t blocks) {
  __shared__ double scratch[warp_size];
  const int64_t block = static_cast<int64_t>(blockIdx.x) * nested_block_size + threadIdx.x;
  if (block < blocks) absmax[block] = scale;
  if (sums == nullptr) return;
  const double sum = block_sum<double>(block < blocks ? scale : 0.0, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/// nf4::code by a search in 31 bins of width 1/15, none of which holds two thresholds: lane b has
/// the number of thresholds below bin b and the one inside.
struct Bins {
  static constexpr float shift = 8388624.0f;  // 2^23 + 16
  float inside = __builtin_inff();
  uint32_t below = 0;

  __device__ static uint32_t bin(float x) { return __float_as_uint(fmaf(x, 15.0f, shift)); }
  __device__ Bins() {
    const uint32_t lane = threadIdx.x % warp_size;
#pragma unroll
    for (int i = 0; i < 15; ++i) {
      const uint32_t b = bin(nf4::threshold(i)) % warp_size;
      below += b < lane;
      if (b == lane) inside = nf4::threshold(i);
    }
  }
  /// Of all lanes together; |x| <= 1 but for roundings, or NaN. A code is put `place` bits up.
  __device__ uint32_t code(float x, int place) const {
    const float clamped = fmaxf(x, -1.0f);  // NaN becomes -1, whose code is 0 as well
    const uint32_t b = bin(clamped);        // a shuffle takes its lowest five bits
    const uint32_t base = __shfl_sync(0xffffffffu, below, b) << place;
    const float threshold = __shfl_sync(0xffffffffu, inside, b);
    return clamped > threshold ? base + (1u << place) : base;
  }
};

// One thread block per 256 quantization blocks of 8 * `lanes` values, a lane per eight values: one
// read of x, one write of the codes.
template <class T>
__global__ void __launch_bounds__(threads)
    quantize_vectors_kernel(uint32_t* codes, float* absmax, double* sums, const T* x, int64_t n,
                            int64_t blocks, int lanes) {
  __shared__ float scales[threads];
  constexpr int unroll = 4;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int per_step = warp_size / lanes;  // quantization blocks that a warp has at a time
  const Bins bins;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps_per_block + warp) * warp_size *
                            lanes * vector_width +
                        lane * vector_width;
  for (int step = 0; step < lanes; step += unroll) {
    float v[unroll][vector_width] = {};
#pragma unroll
    for (int k = 0; k < unroll; ++k) {
      const int64_t i = first + (step + k) * warp_size * vector_width;
      if (i < n) load(v[k], x + i);
    }
#pragma unroll
    for (int k = 0; k < unroll; ++k) {
      const int64_t i = first + (step + k) * warp_size * vector_width;
      float largest = 0;
      for (int j = 0; j < vector_width; ++j) largest = fmaxf(largest, fabsf(v[k][j]));
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
      const float inverse = reciprocal(largest);
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < vector_width; ++j)
        word += bins.code(multiply_flushed(v[k][j], inverse), 8 * (j / 2) + (j % 2 == 0 ? 4 : 0));
      if (i < n) codes[i / vector_width] = word;
      if (lane % lanes == 0)
        scales[warp * warp_size + (step + k) * per_step + lane / lanes] = largest;
    }
  }
  __syncthreads();
  finish_scales(absmax, sums, scales[threadIdx.x], blocks);
}

constexpr int wide_vectors = 2;  // per lane
constexpr int wide_per_warp = wide_vectors * warp_size * vector_width;
constexpr int wide_per_block = warps_per_block * wide_per_warp;

// Quantization blocks of more than 256 values, each of `warps` warps side by side: one read of x,
// one write of the codes. Thread blocks of 256 such blocks would be too few for a GPU.
template <class T>
__global__ void __launch_bounds__(threads)
    quantize_wide_kernel(uint32_t* codes, float* absmax, const T* x, int64_t n, int warps) {
  __shared__ float maxima[warps_per_block];
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const Bins bins;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * wide_per_block + warp * wide_per_warp;
  float v[wide_vectors][vector_width] = {};
  float largest = 0;
#pragma unroll
  for (int k = 0; k < wide_vectors; ++k) {
    const int64_t i = first + (k * warp_size + lane) * vector_width;
    if (i < n) load(v[k], x + i);
    for (int j = 0; j < vector_width; ++j) largest = fmaxf(largest, fabsf(v[k][j]));
  }
  largest = warp_max(largest);
  if (lane == 0) maxima[warp] = largest;
  __syncthreads();
  const int leader = warp / warps * warps;
  for (int w = leader; w < leader + warps; ++w) largest = fmaxf(largest, maxima[w]);
  const float inverse = reciprocal(largest);
#pragma unroll
  for (int k = 0; k < wide_vectors; ++k) {
    const int64_t i = first + (k * warp_size + lane) * vector_width;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < vector_width; ++j)
      word += bins.code(multiply_flushed(v[k][j], inverse), 8 * (j / 2) + (j % 2 == 0 ? 4 : 0));
    if (i < n) codes[i / vector_width] = word;
  }
  if (warp == leader && lane == 0 && first < n) absmax[first / (warps * wide_per_warp)] = largest;
}

// The sums of 256 scales each that the other kernels form on the way.
__global__ void __launch_bounds__(threads)
    sum_scales_kernel(double* sums, const float* absmax, int64_t blocks) {
  __shared__ double scratch[warp_size];
  const int64_t block = static_cast<int64_t>(blockIdx.x) * nested_block_size + threadIdx.x;
  const double sum = block_sum<double>(block < blocks ? absmax[block] : 0.0, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One thread block per 256 quantization blocks, one warp per block and one lane per byte; x is read
// twice (the second time from cache). For sizes and places that allow no vectors.
template <class T>
__global__ void __launch_bounds__(threads)
    quantize_elements_kernel(uint8_t* codes, float* absmax, double* sums, const T* x, int64_t n,
                             int64_t blocks, int64_t block_size) {
  __shared__ float scales[threads];
  const int lane = threadIdx.x % warp_size;
  for (int b = threadIdx.x / warp_size; b < threads; b += warps_per_block) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * nested_block_size + b;
    if (block >= blocks) break;
    const int64_t begin = block * block_size;
    const int64_t end = begin + block_size < n ? begin + block_size : n;
    float largest = 0;
    for (int64_t i = begin + lane; i < end; i += warp_size)
      largest = fmaxf(largest, fabsf(static_cast<float>(x[i])));
    largest = warp_max(largest);
    if (lane == 0) scales[b] = largest;
    const float inverse = reciprocal(largest);
    for (int64_t i = begin + 2 * lane; i < end; i += 2 * warp_size) {
      const float first = static_cast<float>(x[i]);
      const float second = i + 1 < end ? static_cast<float>(x[i + 1]) : 0.0f;
      const int high = nf4::code(multiply_flushed(first, inverse));
      const int low = nf4::code(multiply_flushed(second, inverse));
      codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  }
  __syncthreads();
  finish_scales(absmax, sums, scales[threadIdx.x], blocks);
}

// One thread block; the order of cpu::quantize_scales.
__global__ void __launch_bounds__(mean_lanes)
    mean_kernel(float* mean, const double* sums, int64_t count, int64_t blocks) {
  __shared__ double scratch[warp_size];
  await_previous();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += mean_lanes) sum += sums[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0)
    *mean = blocks == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(blocks));
}

// One warp per 256 scales.
__global__ void __launch_bounds__(threads)
    quantize_scales_kernel(uint8_t* codes, float* absmax2, const float* absmax, const float* mean,
                           const float* map, int64_t blocks) {
  constexpr int per_lane = nested_block_size / warp_size;
  __shared__ float shared_map[threads];
  await_previous();
  shared_map[threadIdx.x] = map[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % warp_size;
  const int64_t nested =
      static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / warp_size;
  const int64_t first = nested * nested_block_size + lane;
  if (nested * nested_block_size >= blocks) return;
  const float offset = *mean;
  float difference[per_lane] = {};
  float largest = 0;
#pragma unroll
  for (int j = 0; j < per_lane; ++j)
    if (const int64_t i = first + j * warp_size; i < blocks) difference[j] = absmax[i] - offset;
#pragma unroll
  for (int j = 0; j < per_lane; ++j) largest = fmaxf(largest, fabsf(difference[j]));
  largest = warp_max(largest);
  if (lane == 0) absmax2[nested] = largest;
  const float inverse = flushed_reciprocal(largest);
#pragma unroll
  for (int j = 0; j < per_lane; ++j)
    if (const int64_t i = first + j * warp_size; i < blocks)
      codes[i] = dynamic_code(shared_map, flushed(difference[j]) * inverse);
}
static_assert(threads == nested_block_size && threads == 256);

constexpr int dequantize_threads = 128;
constexpr int words_per_lane = 8;
constexpr int words_per_warp = words_per_lane * warp_size;
constexpr int words_per_block = words_per_lane * dequantize_threads;

/// Of a matrix, what is left in the L2 until last: scratch is written again for the next product,
/// and as much of it costs no write to memory. By measurement on an H100, whose L2 holds 50 MB; 8
/// to 33 MB make no difference.
constexpr uint32_t lasting_words = (8 << 20) / 16;

__device__ inline void store_lasting(float* to, const float (&v)[vector_width]) { store(to, v); }
template <Half T>
__device__ inline void store_lasting(T* to, const float (&v)[vector_width]) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "r"(pack<T>(v[0], v[1])), "r"(pack<T>(v[2], v[3])), "r"(pack<T>(v[4], v[5])),
               "r"(pack<T>(v[6], v[7])), "l"(policy)
               : "memory");
#else
  store(to, v);
#endif
}

// One warp per 256 words of eight codes, a lane per word and 16 bytes of bf16 to a store. Lane i
// holds value(i % 16), so a code is a shuffle. Reads 0.52, writes 2 (bf16) bytes per element.
template <class T, bool nested>
__global__ void __launch_bounds__(dequantize_threads)
    dequantize_words_kernel(T* y, const uint32_t* codes, Scales scales, uint32_t words,
                            Divider words_per_row, int64_t pitch) {
  __shared__ float map[nested ? map_size : 1];
  const uint32_t lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const uint32_t first = blockIdx.x * words_per_block + warp * words_per_warp + lane;
  const float value = selected_value(threadIdx.x);
  await_previous();
  uint32_t word[words_per_lane];
  Scale<nested> scale[words_per_lane];
#pragma unroll
  for (int u = 0; u < words_per_lane; ++u) {
    const uint32_t w = min(first + u * warp_size, words - 1);
    word[u] = __ldcs(codes + w);
    scale[u].fetch(scales, w >> (scales.shift - 3));
  }
  const float offset = nested ? *scales.offset : 0.0f;
  if constexpr (nested) {
    for (int i = threadIdx.x; i < map_size; i += dequantize_threads) map[i] = scales.map[i];
    __syncthreads();
  }
#pragma unroll
  for (int u = 0; u < words_per_lane; ++u) {
    const uint32_t w = first + u * warp_size;
    const float factor = scale[u].value(map, offset);
    float v[vector_width];
#pragma unroll
    for (int j = 0; j < vector_width; ++j) {
      const int place = 8 * (j / 2) + (j % 2 == 0 ? 4 : 0);
      v[j] = __fmul_rn(__shfl_sync(0xffffffffu, value, word[u] >> place, 16), factor);
    }
    if (w < words) {
      const uint32_t row = words_per_row.quotient(w), at = w - row * words_per_row.divisor();
      T* const to = y + row * pitch + static_cast<int64_t>(at) * vector_width;
      if (w < lasting_words)
        store_lasting(to, v);
      else
        store(to, v);
    }
  }
}

// One thread per element: for rows that do not allow 16-byte stores.
template <class T, bool nested>
__global__ void __launch_bounds__(threads)
    dequantize_elements_kernel(T* y, const uint8_t* codes, Scales scales, int64_t n, int64_t cols,
                               int64_t pitch) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= n) return;
  const int byte = codes[i / 2], code = i % 2 == 0 ? byte >> 4 : byte & 15;
  Scale<nested> scale;
  scale.fetch(scales, i >> scales.shift);
  const float factor = scale.value(scales.map, nested ? *scales.offset : 0.0f);
  const int64_t row = static_cast<uint64_t>(i) / static_cast<uint64_t>(cols);
  y[row * pitch + (i - row * cols)] = static_cast<T>(__fmul_rn(nf4::value(code), factor));
}

template <class T, bool nested>
void dequantize(const Tensor& y, const Tensor& codes, const Scales& scales) {
  const int64_t n = y.numel(), cols = y.contiguous() ? n : y.cols();
  if (!vectorizable(cols, y, codes)) {
    const unsigned blocks = grid_of("dequantize_nf4", ceil_div<int64_t>(n, threads));
    launch_kernel("dequantize_nf4", dequantize_elements_kernel<T, nested>, {blocks, threads},
                  y.data<T>(), codes.data<uint8_t>(), scales, n, cols, y.pitch());
    return;
  }
  const int64_t words = n / vector_width;
  launch_early("dequantize_nf4", dequantize_words_kernel<T, nested>,
               static_cast<unsigned>(ceil_div<int64_t>(words, words_per_block)), dequantize_threads,
               y.data<T>(), reinterpret_cast<const uint32_t*>(codes.raw()), scales,
               static_cast<uint32_t>(words), Divider(cols / vector_width), y.pitch());
}

}  // namespace

void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& sums, const Tensor& x,
                  int64_t block_size) {
  const int64_t n = x.numel(), blocks = absmax.numel();
  if (n == 0) return;
  const unsigned grid = grid_of("quantize_nf4", ceil_div<int64_t>(blocks, nested_block_size));
  double* const sum = sums.defined() ? sums.data<double>() : nullptr;
  const bool vectors = n % vector_width == 0 && aligned16(x.raw());
  const bool wide = vectors && block_size >= wide_per_warp && block_size <= wide_per_block;
  dispatch(CudaFloats{}, x.dtype(), "quantize_nf4", [&]<class T>() {
    if (wide)
      launch_kernel("quantize_nf4", quantize_wide_kernel<T>,
                    {grid_of("quantize_nf4", ceil_div<int64_t>(n, wide_per_block)), threads},
                    static_cast<uint32_t*>(codes.raw()), absmax.data<float>(), x.data<T>(), n,
                    static_cast<int>(block_size / wide_per_warp));
    else if (vectors && block_size <= warp_size * vector_width)
      launch_kernel("quantize_nf4", quantize_vectors_kernel<T>, {grid, threads},
                    static_cast<uint32_t*>(codes.raw()), absmax.data<float>(), sum, x.data<T>(), n,
                    blocks, static_cast<int>(block_size / vector_width));
    else
      launch_kernel("quantize_nf4", quantize_elements_kernel<T>, {grid, threads},
                    codes.data<uint8_t>(), absmax.data<float>(), sum, x.data<T>(), n, blocks,
                    block_size);
  });
  if (wide && sum != nullptr)
    launch_kernel("quantize_nf4", sum_scales_kernel, {grid, threads}, sum, absmax.data<float>(),
                  blocks);
  // Ordinary launches, before which all earlier writes ended; behind `sums` comes quantize_scales.
  writes_read_early() = !sums.defined();
}

void quantize_scales(const Nf4Tensor& out, const Tensor& absmax, const Tensor& sums) {
  const int64_t blocks = absmax.numel(), nested = sums.numel();
  float* const mean = out.offset.data<float>();
  launch_early("quantize_scales", mean_kernel, 1, mean_lanes, mean, sums.data<double>(), nested,
               blocks);
  if (nested == 0) return;
  launch_early("quantize_scales", quantize_scales_kernel,
               grid_of("quantize_scales", ceil_div<int64_t>(nested, warps_per_block)), threads,
               out.absmax_code.data<uint8_t>(), out.absmax2.data<float>(), absmax.data<float>(),
               mean, out.map.data<float>(), blocks);
  writes_read_early() = true;
}

void dequantize_nf4(const Tensor& y, const Nf4Tensor& x) {
  if (y.numel() == 0) return;
  const Scales scales = scales_of(x);
  dispatch(CudaFloats{}, y.dtype(), "dequantize_nf4", [&]<class T>() {
    x.double_quant ? dequantize<T, true>(y, x.codes, scales)
                   : dequantize<T, false>(y, x.codes, scales);
  });
}

}  // namespace qlab::cuda
