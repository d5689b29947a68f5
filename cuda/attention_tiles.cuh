// Products of 64 x 64 tiles in fp32, from which the attention kernels are made. 256 threads stand
// in a 16 x 16 grid; a thread owns four neighbouring rows of a tile and every 16th column (scores)
// or groups of four columns 64 apart (outputs). All loops run in a fixed order.
#pragma once
#include "cuda/launch.cuh"

namespace qlab::cuda {

inline constexpr int attention_threads = 256;
inline constexpr int tile = 64;
inline constexpr int feature_step = 32;                 // columns of a score product at a time
inline constexpr int feature_pitch = feature_step + 4;  // conflict-free 16-byte reads down a column
inline constexpr int score_pitch = tile + 4;
inline constexpr int stage_size = 2 * tile * feature_pitch;

struct AttentionShared {
  float stage[stage_size];
  float scores[tile * score_pitch];
};

__device__ inline int thread_row() { return threadIdx.x / 16; }
__device__ inline int thread_col() { return threadIdx.x % 16; }

/// Up to 64 rows of one head; rows from `count` on read as zeros.
template <class T>
struct Rows {
  const T* data;
  int64_t pitch;
  int count;
};

/// Eight neighbouring elements as they are stored, so that a load can stay in flight.
template <class T>
struct Packet {
  uint4 words{};
};
template <>
struct Packet<float> {
  float4 first{}, second{};
};

template <Half T>
__device__ inline void read(Packet<T>& packet, const T* p) {
  packet.words = *reinterpret_cast<const uint4*>(p);
}
__device__ inline void read(Packet<float>& packet, const float* p) {
  packet.first = reinterpret_cast<const float4*>(p)[0];
  packet.second = reinterpret_cast<const float4*>(p)[1];
}
template <class T>
__device__ inline Packet<T> fetch(const Rows<T>& rows, int row, int col, int cols) {
  Packet<T> packet;
  if (row < rows.count && col < cols) read(packet, rows.data + row * rows.pitch + col);
  return packet;
}
__device__ inline void put(float* shared, const Packet<float>& packet) {
  reinterpret_cast<float4*>(shared)[0] = packet.first;
  reinterpret_cast<float4*>(shared)[1] = packet.second;
}
template <Half T>
__device__ inline void put(float* shared, const Packet<T>& packet) {
  Packet<float> wide;
  unpack<T>(wide.first.x, wide.first.y, packet.words.x);
  unpack<T>(wide.first.z, wide.first.w, packet.words.y);
  unpack<T>(wide.second.x, wide.second.y, packet.words.z);
  unpack<T>(wide.second.z, wide.second.w, packet.words.w);
  put(shared, wide);
}
__device__ inline float4 read4(const float* shared) {
  return *reinterpret_cast<const float4*>(shared);
}

using Scores = float[4][4];
/// Four rows; `groups` times four columns, 64 apart.
template <int groups>
using Outputs = float[4][groups][4];

/// scores += A B^T over the features of a head.
template <class T>
__device__ void multiply_nt(Scores& scores, const Rows<T>& a, const Rows<T>& b, int head_dim,
                            AttentionShared& shared) {
  const int row = threadIdx.x / 4, col = threadIdx.x % 4 * vector_width;
  float* const a_stage = shared.stage;
  float* const b_stage = shared.stage + tile * feature_pitch;
  const int slot = row * feature_pitch + col;
  Packet<T> next_a = fetch(a, row, col, head_dim), next_b = fetch(b, row, col, head_dim);
  for (int d = 0; d < head_dim; d += feature_step) {
    __syncthreads();
    put(a_stage + slot, next_a);
    put(b_stage + slot, next_b);
    __syncthreads();
    next_a = fetch(a, row, col + d + feature_step, head_dim);
    next_b = fetch(b, row, col + d + feature_step, head_dim);
#pragma unroll 1
    for (int k = 0; k < feature_step; k += 4) {
      float4 u[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[i] = read4(a_stage + (4 * thread_row() + i) * feature_pitch + k);
        v[i] = read4(b_stage + (thread_col() + 16 * i) * feature_pitch + k);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = scores[i][j];
          sum = fmaf(u[i].x, v[j].x, sum);
          sum = fmaf(u[i].y, v[j].y, sum);
          sum = fmaf(u[i].z, v[j].z, sum);
          sum = fmaf(u[i].w, v[j].w, sum);
        }
    }
  }
}

/// Hands a tile to the next multiply_nn, which synchronizes before it reads.
__device__ inline void put_scores(AttentionShared& shared, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      shared.scores[(4 * thread_row() + i) * score_pitch + thread_col() + 16 * j] = scores[i][j];
}

/// outputs += scores B, the scores in shared memory.
template <int groups, class T>
__device__ void multiply_nn(Outputs<groups>& outputs, const Rows<T>& b, int head_dim,
                            AttentionShared& shared) {
  constexpr int width = 64 * groups;
  constexpr int row_step = attention_threads * vector_width / width;
  constexpr int threads_per_row = width / vector_width;
  static_assert(row_step * width <= stage_size);
  const int row = threadIdx.x / threads_per_row;
  const int col = threadIdx.x % threads_per_row * vector_width;
  Packet<T> next = fetch(b, row, col, head_dim);
  for (int r = 0; r < b.count; r += row_step) {
    __syncthreads();
    put(shared.stage + row * width + col, next);
    __syncthreads();
    next = fetch(b, row + r + row_step, col, head_dim);
#pragma unroll 1
    for (int k = 0; k < row_step; k += 4) {
      float p[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 u = read4(shared.scores + (4 * thread_row() + i) * score_pitch + r + k);
        p[i][0] = u.x, p[i][1] = u.y, p[i][2] = u.z, p[i][3] = u.w;
      }
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int group = 0; group < groups; ++group) {
          const float4 v = read4(shared.stage + (k + step) * width + 64 * group + 4 * thread_col());
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float(&sum)[4] = outputs[i][group];
            sum[0] = fmaf(p[i][step], v.x, sum[0]);
            sum[1] = fmaf(p[i][step], v.y, sum[1]);
            sum[2] = fmaf(p[i][step], v.z, sum[2]);
            sum[3] = fmaf(p[i][step], v.w, sum[3]);
          }
        }
    }
  }
}

__device__ inline void store4(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
template <Half T>
__device__ inline void store4(T* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
}
/// Writes the first `count` rows of a tile.
template <int groups, class T>
__device__ void store_rows(T* data, int64_t pitch, int count, int head_dim,
                           const Outputs<groups>& outputs) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * thread_row() + i;
    if (row >= count) break;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const int col = 64 * group + 4 * thread_col();
      if (col < head_dim) store4(data + row * pitch + col, outputs[i][group]);
    }
  }
}

/// Over the 16 threads that share a row.
__device__ inline float row_max(float v) {
  for (int distance = 8; distance > 0; distance /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, distance));
  return v;
}
__device__ inline float row_sum(float v) {
  for (int distance = 8; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

}  // namespace qlab::cuda
