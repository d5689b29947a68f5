// Attention on tensor cores (sm_80 and newer) for 16-bit elements and head dimensions 64, 80, 96
// and 128; attention.cu decides when. Tiles start at a sequence's own first row, so its bits do not
// depend on its neighbours.
#pragma once
#include "cuda/launch.cuh"

namespace qlab::cuda {

/// One of the matrices [tokens, heads * D]; every row starts at 16 bytes.
template <class T>
struct HeadRows {
  T* data;
  int pitch;

  __device__ T* at(int64_t row, int head, int head_dim) const {
    return data + row * pitch + head * head_dim;
  }
};

template <class T>
HeadRows<T> head_rows(const Tensor& x) {
  return {x.data<std::remove_const_t<T>>(), static_cast<int>(x.pitch())};
}

/// What both passes read.
template <class T>
struct AttentionInputs {
  HeadRows<const T> q, k, v;
  const int32_t *cu_q, *cu_k;
  int sequences, heads, kv_heads, head_dim, max_q, max_k;
  int64_t rows;  // of q
  float scale;
};

/// Whether the code for the current GPU has these kernels and the head dimension is served.
bool attention_mma_supports(int64_t head_dim);

template <class T>
void attention_mma(HeadRows<T> o, float* lse, const AttentionInputs<T>& in);

/// `stats` is scratch of [heads, rows]: what the gradient of a score needs of its query.
template <class T>
void attention_backward_mma(HeadRows<T> dq, HeadRows<T> dk, HeadRows<T> dv, HeadRows<const T> g,
                            HeadRows<const T> o, const float* lse, float2* stats,
                            const AttentionInputs<T>& in);

}  // namespace qlab::cuda
