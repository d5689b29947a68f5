#include "quant/quantize.h"

#include <algorithm>
#include <bit>

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

// One warp per quantization block, one lane per byte; x is read twice (the second time from cache).
template <class T>
__global__ void __launch_bounds__(threads)
    quantize_kernel(uint8_t* codes, float* absmax, const T* x, int64_t n, int64_t blocks,
                    int64_t block_size) {
  const int lane = threadIdx.x % warp_size;
  const int64_t block =
      static_cast<int64_t>(blockIdx.x) * warps_per_block + threadIdx.x / warp_size;
  if (block >= blocks) return;
  const int64_t begin = block * block_size;
  const int64_t end = begin + block_size < n ? begin + block_size : n;
  float largest = 0;
  for (int64_t i = begin + lane; i < end; i += warp_size)
    largest = fmaxf(largest, fabsf(static_cast<float>(x[i])));
  largest = warp_max(largest);
  if (lane == 0) absmax[block] = largest;
  const float inverse = reciprocal(largest);
  for (int64_t i = begin + 2 * lane; i < end; i += 2 * warp_size) {
    const float first = static_cast<float>(x[i]);
    const float second = i + 1 < end ? static_cast<float>(x[i + 1]) : 0.0f;
    const int high = nf4::code(multiply_flushed(first, inverse));
    const int low = nf4::code(multiply_flushed(second, inverse));
    codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
  }
}

/// The scale of a block, stored plainly or in 8 bits.
struct Scales {
  const float* absmax = nullptr;   // plain
  const uint8_t* codes = nullptr;  // nested, with absmax2, map and offset
  const float* absmax2 = nullptr;
  const float* map = nullptr;
  float offset = 0;
  int shift = 0;  // log2 of the elements of a block
};
constexpr int nested_shift = std::countr_zero(static_cast<uint64_t>(nested_block_size));

template <bool nested>
__device__ inline float scale_of(const Scales& s, const float* map, int64_t block) {
  if constexpr (!nested) return s.absmax[block];
  return __fadd_rn(__fmul_rn(map[s.codes[block]], s.absmax2[block >> nested_shift]), s.offset);
}

constexpr int words_per_thread = 4;

// One thread per words of eight codes, 16 bytes of bf16 to a store; the pair of values of every
// byte and the map lie in shared memory. Reads 0.52, writes 2 (bf16) bytes per element.
template <class T, bool nested>
__global__ void __launch_bounds__(threads)
    dequantize_words_kernel(T* y, const uint32_t* codes, Scales scales, int64_t words,
                            int64_t words_per_row, int64_t pitch) {
  __shared__ float2 pairs[256];
  __shared__ float map[256];
  pairs[threadIdx.x] = make_float2(nf4::value(threadIdx.x >> 4), nf4::value(threadIdx.x & 15));
  if constexpr (nested) map[threadIdx.x] = scales.map[threadIdx.x];
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(gridDim.x) * threads * words_per_thread;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * threads * words_per_thread;
  for (int64_t first = start + threadIdx.x; first < words; first += stride) {
    uint32_t word[words_per_thread];
    float scale[words_per_thread];
#pragma unroll
    for (int u = 0; u < words_per_thread; ++u) {
      const int64_t w = first + u * threads;
      if (w >= words) break;
      word[u] = __ldcs(codes + w);
      scale[u] = scale_of<nested>(scales, map, w >> (scales.shift - 3));
    }
#pragma unroll
    for (int u = 0; u < words_per_thread; ++u) {
      const int64_t w = first + u * threads;
      if (w >= words) break;
      float v[vector_width];
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const float2 pair = pairs[word[u] >> (8 * byte) & 0xffu];
        v[2 * byte] = __fmul_rn(pair.x, scale[u]);
        v[2 * byte + 1] = __fmul_rn(pair.y, scale[u]);
      }
      const int64_t row = words == words_per_row
                              ? 0
                              : static_cast<uint64_t>(w) / static_cast<uint64_t>(words_per_row);
      store(y + row * pitch + (w - row * words_per_row) * vector_width, v);
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
  const float scale = scale_of<nested>(scales, scales.map, i >> scales.shift);
  const int64_t row = static_cast<uint64_t>(i) / static_cast<uint64_t>(cols);
  y[row * pitch + (i - row * cols)] = static_cast<T>(__fmul_rn(nf4::value(code), scale));
}

template <class T, bool nested>
void dequantize(const Tensor& y, const Tensor& codes, const Scales& scales) {
  const int64_t n = y.numel(), cols = y.contiguous() ? n : y.cols();
  if (!vectorizable(cols, y, codes)) {
    const unsigned blocks = grid_of("dequantize_nf4", ceil_div<int64_t>(n, threads));
    dequantize_elements_kernel<T, nested><<<blocks, threads, 0, current_stream()>>>(
        y.data<T>(), codes.data<uint8_t>(), scales, n, cols, y.pitch());
    return;
  }
  // Eight blocks fill a multiprocessor; more would only build the tables again.
  const int64_t words = n / vector_width;
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(words, threads * words_per_thread),
                                           8 * multiprocessor_count());
  dequantize_words_kernel<T, nested>
      <<<static_cast<unsigned>(blocks), threads, 0, current_stream()>>>(
          y.data<T>(), reinterpret_cast<const uint32_t*>(codes.raw()), scales, words,
          cols / vector_width, y.pitch());
}

}  // namespace

void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& x, int64_t block_size) {
  const int64_t n = x.numel(), blocks = ceil_div(n, block_size);
  if (n == 0) return;
  const unsigned grid = grid_of("quantize_nf4", ceil_div<int64_t>(blocks, warps_per_block));
  dispatch(CudaFloats{}, x.dtype(), "quantize_nf4", [&]<class T>() {
    quantize_kernel<<<grid, threads, 0, current_stream()>>>(
        codes.data<uint8_t>(), absmax.data<float>(), x.data<T>(), n, blocks, block_size);
  });
  check_launch("quantize_nf4");
}

void dequantize_nf4(const Tensor& y, const Nf4Tensor& x) {
  if (y.numel() == 0) return;
  Scales scales;
  scales.shift = std::countr_zero(static_cast<uint64_t>(x.block_size));
  if (x.double_quant) {
    scales.offset = x.offset;
    scales.codes = x.absmax_code.data<uint8_t>();
    scales.absmax2 = x.absmax2.data<float>();
    scales.map = x.map.data<float>();
  } else {
    scales.absmax = x.absmax.data<float>();
  }
  dispatch(CudaFloats{}, y.dtype(), "dequantize_nf4", [&]<class T>() {
    x.double_quant ? dequantize<T, true>(y, x.codes, scales)
                   : dequantize<T, false>(y, x.codes, scales);
  });
  check_launch("dequantize_nf4");
}

}  // namespace qlab::cuda
