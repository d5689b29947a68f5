#include "core/ops/attention.h"

#include <algorithm>
#include <utility>

#include "core/gpu_limits.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_cu(const char* op, const char* name, const Tensor& cu, const Tensor& x) {
  QLAB_CHECK(cu.rank() == 1 && cu.dim(0) >= 1 && cu.dtype() == DType::i32,
             "[{}] {} must be int32 [sequences + 1], got {}", op, name, cu.str());
  check_device(op, x, cu);
}

void check_matrix(const char* op, const char* name, const Tensor& x, const Shape& shape,
                  const Tensor& like) {
  check_shape(op, name, x, shape);
  QLAB_CHECK(x.dtype() == like.dtype(), "[{}] {} must be {}, got {}", op, name,
             name_of(like.dtype()), x.str());
  check_device(op, like, x);
}

/// What the kernels of all GPUs together take: the last resort, attention_kernel in
/// cuda/attention.cu.
void check_gpu(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               const Tensor& cu_q, const AttentionShape& s) {
  const Device device = q.device();
  if (device.target != DeviceType::cuda) return;
  if (s.head_dim % 8 != 0 || s.head_dim > 256)
    fail("[{}] a GPU takes a head_dim that is a multiple of 8 up to 256, got {}: q {}", op,
         s.head_dim, q.str());
  check_gpu_matrix(op, q);
  for (const Tensor* x : {&q, &k, &v}) check_gpu_rows(op, *x);
  constexpr int64_t most_heads = 65535, tile = 64;
  check_gpu_count(op, q, "heads", s.heads, most_heads);
  check_gpu_count(op, q, "tiles of 64 rows in all sequences and heads",
                  (cu_q.dim(0) - 1) * ((std::max(s.max_q, s.max_k) + tile - 1) / tile) * s.heads);
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& s) {
  QLAB_CHECK(s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.heads > 0 && s.head_dim > 0,
             "[{}] heads must be a multiple of kv_heads, got {} and {} of dimension {}", op,
             s.heads, s.kv_heads, s.head_dim);
  QLAB_CHECK(q.rank() == 2 && k.rank() == 2, "[{}] q and k must be matrices, got {} and {}", op,
             q.str(), k.str());
  check_matrix(op, "q", q, {q.dim(0), s.heads * s.head_dim}, q);
  check_matrix(op, "k", k, {k.dim(0), s.kv_heads * s.head_dim}, q);
  check_matrix(op, "v", v, k.shape(), q);
  check_cu(op, "cu_q", cu_q, q);
  check_cu(op, "cu_k", cu_k, q);
  check_shape(op, "cu_k", cu_k, cu_q.shape());
  QLAB_CHECK(s.max_q <= q.dim(0) && s.max_k <= k.dim(0),
             "[{}] max_q and max_k must not exceed the {} and {} rows, got {} and {}", op, q.dim(0),
             k.dim(0), s.max_q, s.max_k);
  check_gpu(op, q, k, v, cu_q, s);
}

DType statistic_of(const Tensor& x) { return x.dtype() == DType::f64 ? DType::f64 : DType::f32; }

Tensor workspace_of(int64_t bytes, Device device) {
  const MemoryTag tag(Category::workspace);
  return Tensor::empty({bytes}, DType::u8, device);
}

}  // namespace

AttentionColumns attention_columns(const Tensor& merged, const AttentionShape& shape) {
  const int64_t q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
  check_shape("attention", "q | k | v", merged, {merged.dim(0), q + 2 * kv});
  return {merged.slice_cols(0, q), merged.slice_cols(q, q + kv),
          merged.slice_cols(q + kv, q + 2 * kv)};
}

namespace {
/// Floating-point operations of one of the products between all visible pairs, exact when all
/// sequences are as long as the longest.
double pairs(const Tensor& q, const AttentionShape& shape) {
  return static_cast<double>(q.numel()) * static_cast<double>(shape.max_k);
}
}  // namespace

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                    const Tensor& cu_k, const AttentionShape& shape, int64_t tail) {
  check_inputs("attention", q, k, v, cu_q, cu_k, shape);
  const Device device = q.device();
  Attention out{Tensor::with_tail(q.dim(0), q.dim(1), tail, q.dtype(), device),
                Tensor::empty({q.dim(0), shape.heads}, statistic_of(q), device)};
  if (q.dim(0) == 0) return out;
  const Tensor workspace = device.target == DeviceType::cpu
                               ? workspace_of(cpu::attention_workspace(shape, q.dtype()), device)
                               : Tensor();
  const OpScope scope("attention", device, {2 * pairs(q, shape), bytes_of_all(q, k, v, out.o)});
  on_device(
      device, [&] { cpu::attention(out.o, out.lse, q, k, v, cu_q, cu_k, shape, workspace); },
      [&] { cuda::attention(out.o, out.lse, q, k, v, cu_q, cu_k, shape, workspace); });
  return out;
}

Tensor attention_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& o, const Tensor& lse, const Tensor& cu_q,
                          const Tensor& cu_k, const AttentionShape& shape, int64_t tail) {
  const char* op = "attention_backward";
  check_inputs(op, q, k, v, cu_q, cu_k, shape);
  QLAB_CHECK(q.dim(0) == k.dim(0), "[{}] q and k must have as many rows, got {} and {}", op,
             q.str(), k.str());
  check_matrix(op, "g", g, q.shape(), q);
  check_matrix(op, "o", o, q.shape(), q);
  for (const Tensor* x : {&g, &o}) check_gpu_rows(op, *x);
  check_shape(op, "lse", lse, {q.dim(0), shape.heads});
  QLAB_CHECK(lse.dtype() == statistic_of(q), "[{}] lse must be {}, got {}", op,
             name_of(statistic_of(q)), lse.str());
  check_device(op, q, lse);
  const Device device = q.device();
  const Tensor out =
      Tensor::with_tail(q.dim(0), q.dim(1) + k.dim(1) + v.dim(1), tail, q.dtype(), device);
  if (q.dim(0) == 0) return out;
  const AttentionColumns d = attention_columns(out, shape);
  const int64_t stats = shape.heads * attention_stats_pitch(q.dim(0), cu_q.dim(0) - 1);
  const int64_t bytes = device.target == DeviceType::cpu
                            ? cpu::attention_backward_workspace(shape, q.dtype())
                            : stats * static_cast<int64_t>(2 * sizeof(float));
  const Tensor workspace = workspace_of(bytes, device);
  const OpScope scope("attention_backward", device,
                      {5 * pairs(q, shape), 2 * bytes_of_all(q, k, v, o)});
  on_device(
      device,
      [&] {
        cpu::attention_backward(d.q, d.k, d.v, g, q, k, v, o, lse, cu_q, cu_k, shape, workspace);
      },
      [&] {
        cuda::attention_backward(d.q, d.k, d.v, g, q, k, v, o, lse, cu_q, cu_k, shape, workspace);
      });
  return out;
}

namespace cpu {
namespace {

constexpr int64_t tile = 32;  // query rows whose scores are held at once
int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

/// Rows x 16 columns of C (+)= A B over k, one multiply-add chain per element.
template <int width, int rows, int blocks, class A>
QLAB_INLINE inline void product_block(A* c, int64_t ldc, const A* a, int64_t row_stride,
                                      int64_t k_stride, const A* b, int64_t ldb, int64_t k,
                                      bool accumulate) {
  using L = Lanes<A, width>;
  L sum[rows][blocks];
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j)
      sum[i][j] = accumulate ? L::load(c + i * ldc + 16 * j) : L::all(0);
  for (int64_t p = 0; p < k; ++p) {
    L right[blocks];
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j) right[j] = L::load(b + p * ldb + 16 * j);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
      const A left = a[i * row_stride + p * k_stride];
#pragma GCC unroll 2
      for (int j = 0; j < blocks; ++j) sum[i][j] = sum[i][j] + right[j] * left;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j) sum[i][j].store(c + i * ldc + 16 * j);
}

/// C [m, n] = A [m, k] B [k, n], or added to C. n is a multiple of 16; element (i, p) of A lies at
/// i row_stride + p k_stride. The chain over p is the same however the rows are grouped.
template <int width, class A>
QLAB_INLINE inline void product(A* c, int64_t ldc, const A* a, int64_t row_stride, int64_t k_stride,
                                const A* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
                                bool accumulate) {
  constexpr int wide = width * 2 / static_cast<int>(sizeof(A)) >= 32 ? 2 : 1;
  constexpr int64_t depth = 128;  // rows of B that stay in the first-level cache
  for (int64_t p = 0; p < k; p += depth) {
    const int64_t kp = std::min(depth, k - p);
    const A* ap = a + p * k_stride;
    const A* bp = b + p * ldb;
    const bool add = accumulate || p > 0;
    for (int64_t j = 0, step; j < n; j += step) {
      const bool full = wide == 2 && n - j >= 32;
      step = full ? 32 : 16;
      int64_t i = 0;
      for (; i + 4 <= m; i += 4) {
        if (full)
          product_block<width, 4, wide>(c + i * ldc + j, ldc, ap + i * row_stride, row_stride,
                                        k_stride, bp + j, ldb, kp, add);
        else
          product_block<width, 4, 1>(c + i * ldc + j, ldc, ap + i * row_stride, row_stride,
                                     k_stride, bp + j, ldb, kp, add);
      }
      for (; i < m; ++i) {
        if (full)
          product_block<width, 1, wide>(c + i * ldc + j, ldc, ap + i * row_stride, row_stride,
                                        k_stride, bp + j, ldb, kp, add);
        else
          product_block<width, 1, 1>(c + i * ldc + j, ldc, ap + i * row_stride, row_stride,
                                     k_stride, bp + j, ldb, kp, add);
      }
    }
  }
}

/// to [rows, padded(cols)] = from [rows, cols], widened, padding zero.
template <class T, class A>
void pack(A* to, const T* from, int64_t pitch, int64_t rows, int64_t cols) {
  const int64_t ld = padded(cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to[i * ld + j] = static_cast<A>(from[i * pitch + j]);
    for (int64_t j = cols; j < ld; ++j) to[i * ld + j] = A(0);
  }
}

/// to [cols, padded(rows)] = from [rows, cols] transposed, padding zero.
template <class T, class A>
void pack_transposed(A* to, const T* from, int64_t pitch, int64_t rows, int64_t cols) {
  const int64_t ld = padded(rows);
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t l = i; l < i + 16; ++l)
        to[j * ld + l] = l < rows ? static_cast<A>(from[l * pitch + j]) : A(0);
}

template <class T, class A>
void unpack(T* to, int64_t pitch, const A* from, int64_t rows, int64_t cols) {
  const int64_t ld = padded(cols);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) to[i * pitch + j] = static_cast<T>(from[i * ld + j]);
}

/// The part of the workspace that one thread uses, handed out piece by piece.
template <class A>
struct Scratch {
  A* next;
  A* take(int64_t elements) { return std::exchange(next, next + elements); }
};

int64_t forward_elements(const AttentionShape& s) {
  const int64_t keys = padded(s.max_k), dim = padded(s.head_dim);
  return keys * dim * 2 + tile * (keys + 2 * dim);
}
int64_t backward_elements(const AttentionShape& s) {
  const int64_t keys = padded(s.max_k), dim = padded(s.head_dim);
  return keys * dim * 5 + tile * (2 * keys + 3 * dim);
}
int64_t bytes_for(int64_t elements, DType dtype) {
  return elements * thread_count() * (dtype == DType::f64 ? 8 : 4);
}

/// Runs body(sequence, head, elements of scratch) for all pairs; pair i goes to thread i % threads.
template <class A, class F>
void for_each_pair(const Tensor& workspace, int64_t elements, int64_t sequences, int64_t heads,
                   const F& body) {
  const int64_t threads =
      workspace.numel() / std::max<int64_t>(1, elements * static_cast<int64_t>(sizeof(A)));
  A* base = static_cast<A*>(workspace.raw());
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = thread; i < sequences * heads; i += threads)
        body(i / heads, i % heads, Scratch<A>{base + thread * elements});
  });
}

struct Span {
  int64_t q, len_q, k, len_k;  // first row and length of a sequence's queries and keys
  /// Keys that query i sees.
  int64_t visible(int64_t i) const { return std::max<int64_t>(0, i + 1 + len_k - len_q); }
};

Span span_of(const Tensor& cu_q, const Tensor& cu_k, int64_t sequence, const AttentionShape& s) {
  const int32_t *q = cu_q.data<int32_t>() + sequence, *k = cu_k.data<int32_t>() + sequence;
  const Span span{q[0], q[1] - q[0], k[0], k[1] - k[0]};
  QLAB_CHECK(
      span.len_q >= 0 && span.len_q <= s.max_q && span.len_k >= 0 && span.len_k <= s.max_k,
      "[attention] sequence {} has {} queries and {} keys, the longest were to have {} and {}",
      sequence, span.len_q, span.len_k, s.max_q, s.max_k);
  return span;
}

void check_coverage(const Tensor& cu, int64_t rows) {
  const int32_t* offset = cu.data<int32_t>();
  QLAB_CHECK(offset[0] == 0 && offset[cu.dim(0) - 1] == rows,
             "[attention] sequences must cover the {} rows, got {} to {}", rows, offset[0],
             offset[cu.dim(0) - 1]);
}

/// s becomes exp(scale s - shift) for the visible keys and zero up to `end`; returns its sum.
template <int width, class A>
QLAB_INLINE inline A exponentials(A* s, int64_t visible, int64_t end, A scale, A shift) {
  using L = Lanes<A, width>;
  constexpr A hidden = -std::numeric_limits<A>::infinity();
  L sum = L::all(0);
  for (int64_t j = 0; j < visible; j += 16) {
    const L p = exp(L::load(s + j, visible - j, hidden) * scale - shift);
    p.store(s + j);
    sum = sum + p;
  }
  std::fill(s + std::min(padded(visible), end), s + end, A(0));
  return sum.sum();
}

template <int width, class A>
QLAB_INLINE inline A row_maximum(const A* s, int64_t visible) {
  using L = Lanes<A, width>;
  constexpr A hidden = -std::numeric_limits<A>::infinity();
  L highest = L::all(hidden);
  for (int64_t j = 0; j < visible; j += 16)
    highest = max(highest, L::load(s + j, visible - j, hidden));
  return highest.maximum();
}

/// One of the matrices [tokens, heads * D].
template <class T>
struct Matrix {
  T* data;
  int64_t pitch, dim;

  Matrix(const Tensor& x, int64_t head_dim) : data(x.data<T>()), pitch(x.pitch()), dim(head_dim) {}
  T* at(int64_t row, int64_t head) const { return data + row * pitch + head * dim; }
};

template <class T>
struct ForwardPair {
  using A = accumulate_t<T>;
  Matrix<T> o;
  A* lse;
  Matrix<T> q, k, v;
  AttentionShape shape;

  void operator()(const Span& span, int64_t head, Scratch<A> scratch) const {
    const int64_t dim = shape.head_dim, kv_head = head / (shape.heads / shape.kv_heads);
    A* keys = scratch.take(dim * padded(span.len_k));
    A* values = scratch.take(span.len_k * padded(dim));
    pack_transposed(keys, k.at(span.k, kv_head), k.pitch, span.len_k, dim);
    pack(values, v.at(span.k, kv_head), v.pitch, span.len_k, dim);
    for (int64_t first = 0; first < span.len_q; first += tile)
      vectorized([&]<int width>()
                     QLAB_INLINE { query_tile<width>(span, head, first, keys, values, scratch); });
  }

  template <int width>
  QLAB_INLINE void query_tile(const Span& span, int64_t head, int64_t first, const A* keys,
                              const A* values, Scratch<A> scratch) const {
    const int64_t dim = shape.head_dim, ld = padded(dim);
    const int64_t rows = std::min(tile, span.len_q - first);
    const int64_t visible = span.visible(first + rows - 1), end = padded(visible);
    const A scale = A(1) / std::sqrt(static_cast<A>(dim));
    const int64_t row0 = span.q + first;
    A* queries = scratch.take(tile * ld);
    A* out = scratch.take(tile * ld);
    A* s = scratch.take(tile * end);
    pack(queries, q.at(row0, head), q.pitch, rows, dim);
    product<width>(s, end, queries, ld, int64_t{1}, keys, padded(span.len_k), rows, end, dim,
                   false);
    A total[tile];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = span.visible(first + i);
      const A shift = scale * row_maximum<width>(s + i * end, seen);
      total[i] = exponentials<width>(s + i * end, seen, end, scale, shift);
      lse[(row0 + i) * shape.heads + head] = shift + std::log(total[i]);
    }
    std::fill(out, out + rows * ld, A(0));
    product<width>(out, ld, s, end, int64_t{1}, values, ld, rows, ld, visible, true);
    for (int64_t i = 0; i < rows; ++i) {
      const A inverse = total[i] == A(0) ? A(0) : A(1) / total[i];
      T* to = o.at(row0 + i, head);
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(out[i * ld + d] * inverse);
    }
  }
};

template <class T>
struct BackwardPair {
  using A = accumulate_t<T>;
  Matrix<T> dq, dk, dv, g, q, k, v, o;
  const A* lse;
  AttentionShape shape;

  struct Packed {
    A *keys, *keys_t, *values_t, *dk, *dv;
  };

  void operator()(const Span& span, int64_t kv_head, Scratch<A> scratch) const {
    const int64_t dim = shape.head_dim, ld = padded(dim), keys = padded(span.len_k);
    const T* key_rows = k.at(span.k, kv_head);
    const Packed packed{scratch.take(span.len_k * ld), scratch.take(dim * keys),
                        scratch.take(dim * keys), scratch.take(keys * ld), scratch.take(keys * ld)};
    pack(packed.keys, key_rows, k.pitch, span.len_k, dim);
    pack_transposed(packed.keys_t, key_rows, k.pitch, span.len_k, dim);
    pack_transposed(packed.values_t, v.at(span.k, kv_head), v.pitch, span.len_k, dim);
    std::fill(packed.dk, packed.dk + keys * ld, A(0));
    std::fill(packed.dv, packed.dv + keys * ld, A(0));
    const int64_t group = shape.heads / shape.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < span.len_q; first += tile)
        vectorized([&]<int width>()
                       QLAB_INLINE { query_tile<width>(span, head, first, packed, scratch); });
    unpack(dk.at(span.k, kv_head), dk.pitch, packed.dk, span.len_k, dim);
    unpack(dv.at(span.k, kv_head), dv.pitch, packed.dv, span.len_k, dim);
  }

  template <int width>
  QLAB_INLINE void query_tile(const Span& span, int64_t head, int64_t first, const Packed& packed,
                              Scratch<A> scratch) const {
    const int64_t dim = shape.head_dim, ld = padded(dim);
    const int64_t rows = std::min(tile, span.len_q - first), keys = padded(span.len_k);
    const int64_t visible = span.visible(first + rows - 1), end = padded(visible);
    const int64_t row0 = span.q + first;
    A* queries = scratch.take(tile * ld);
    A* grads = scratch.take(tile * ld);
    A* out = scratch.take(tile * ld);
    A* p = scratch.take(tile * end);
    A* ds = scratch.take(tile * end);
    pack(queries, q.at(row0, head), q.pitch, rows, dim);
    pack(grads, g.at(row0, head), g.pitch, rows, dim);
    product<width>(p, end, queries, ld, int64_t{1}, packed.keys_t, keys, rows, end, dim, false);
    product<width>(ds, end, grads, ld, int64_t{1}, packed.values_t, keys, rows, end, dim, false);
    for (int64_t i = 0; i < rows; ++i)
      score_gradient<width>(p + i * end, ds + i * end, span.visible(first + i), end, grads + i * ld,
                            o.at(row0 + i, head), lse[(row0 + i) * shape.heads + head]);
    std::fill(out, out + rows * ld, A(0));
    product<width>(out, ld, ds, end, int64_t{1}, packed.keys, ld, rows, ld, visible, true);
    unpack(dq.at(row0, head), dq.pitch, out, rows, dim);
    product<width>(packed.dv, ld, p, int64_t{1}, end, grads, ld, visible, ld, rows, true);
    product<width>(packed.dk, ld, ds, int64_t{1}, end, queries, ld, visible, ld, rows, true);
  }

  /// One query: scores become P, and dP becomes dS = P (dP - delta) / sqrt(D).
  template <int width>
  QLAB_INLINE void score_gradient(A* p, A* ds, int64_t visible, int64_t end, const A* grad,
                                  const T* output, A log_sum) const {
    using L = Lanes<A, width>;
    const int64_t dim = shape.head_dim;
    const A scale = A(1) / std::sqrt(static_cast<A>(dim));
    L products = L::all(0);
    for (int64_t d = 0; d < dim; d += 16)
      products = products + L::load(grad + d) * L::load(output + d, dim - d);
    const A delta = products.sum();
    exponentials<width>(p, visible, end, scale, log_sum);
    for (int64_t j = 0; j < end; j += 16) {
      const L zero = L::all(0);
      const L change = (L::load(p + j) * (L::load(ds + j) - delta)) * scale;
      (j < visible ? change : zero).store(ds + j);
    }
  }
};

}  // namespace

int64_t attention_workspace(const AttentionShape& shape, DType dtype) {
  return bytes_for(forward_elements(shape), dtype);
}
int64_t attention_backward_workspace(const AttentionShape& shape, DType dtype) {
  return bytes_for(backward_elements(shape), dtype);
}

void attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, const AttentionShape& shape,
               const Tensor& workspace) {
  check_coverage(cu_q, q.dim(0));
  check_coverage(cu_k, k.dim(0));
  dispatch(CpuFloats{}, q.dtype(), "attention", [&]<class T>() {
    using A = accumulate_t<T>;
    const int64_t dim = shape.head_dim;
    const ForwardPair<T> pair{{o, dim}, lse.data<A>(), {q, dim}, {k, dim}, {v, dim}, shape};
    for_each_pair<A>(workspace, forward_elements(shape), cu_q.dim(0) - 1, shape.heads,
                     [&](int64_t sequence, int64_t head, const Scratch<A>& scratch) {
                       pair(span_of(cu_q, cu_k, sequence, shape), head, scratch);
                     });
  });
}

void attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& g,
                        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                        const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        const AttentionShape& shape, const Tensor& workspace) {
  check_coverage(cu_q, q.dim(0));
  check_coverage(cu_k, k.dim(0));
  dispatch(CpuFloats{}, q.dtype(), "attention_backward", [&]<class T>() {
    using A = accumulate_t<T>;
    const int64_t dim = shape.head_dim;
    const BackwardPair<T> pair{{dq, dim}, {dk, dim}, {dv, dim}, {g, dim},      {q, dim},
                               {k, dim},  {v, dim},  {o, dim},  lse.data<A>(), shape};
    for_each_pair<A>(workspace, backward_elements(shape), cu_q.dim(0) - 1, shape.kv_heads,
                     [&](int64_t sequence, int64_t head, const Scratch<A>& scratch) {
                       pair(span_of(cu_q, cu_k, sequence, shape), head, scratch);
                     });
  });
}

}  // namespace cpu
}  // namespace qlab
