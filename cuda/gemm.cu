#include "core/ops/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "core/device.h"
#include "core/ops/gemm_tiling.h"
#include "cuda/initcheck.cuh"
#include "cuda/launch.cuh"

namespace qlab::cuda {
namespace {

/// What the choice of an algorithm may rely on. No more, or it would depend on where in a gang a
/// trial's rows begin.
constexpr uint32_t largest_alignment = 16;
/// fp32 products add along k in parts of this length: one chain through a vocabulary of 49,152
/// costs a digit, and fp32 is what one compares with.
constexpr int64_t f32_chain = 1024;

/// Everything the choice of an algorithm depends on; also what an error message tells.
struct Product {
  int64_t m, n, k, a_pitch, b_pitch, c_pitch, d_pitch;
  int64_t a_alignment, b_alignment, c_alignment, d_alignment, workspace_bytes;
  Op op_a, op_b;
  SplitK split_k;
  DType in, out;
  int device;
  int proposal;  // GemmProposal::current()

  auto operator<=>(const Product&) const = default;
};

void check_blas(cublasStatus_t status, const char* call, const Product& p) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail("[gemm] {} failed: {} (M {}, N {}, K {}, A{} B{}, {} to {}, pitches {}, {}, {})", call,
       cublasLtGetStatusString(status), p.m, p.n, p.k, p.op_a == Op::none ? "" : "^T",
       p.op_b == Op::none ? "" : "^T", name_of(p.in), name_of(p.out), p.a_pitch, p.b_pitch,
       p.c_pitch);
}

cudaDataType_t data_type(DType dtype) {
  return dtype == DType::f32 ? CUDA_R_32F : dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_16F;
}

/// The largest power of two, at most 16, that divides the address.
int64_t alignment_of(const Tensor& x) {
  const auto address = reinterpret_cast<uintptr_t>(x.raw()) | largest_alignment;
  return static_cast<int64_t>(address & (~address + 1));
}

int64_t pitch_of(const Tensor& x) { return std::max(x.pitch(), x.cols()); }

/// cuBLASLt counts in columns: a row-major matrix is its transpose, so C^T = op(B)^T op(A)^T is
/// computed with B first, and every operation keeps its name; what it calls C is our addend D.
struct Descriptors {
  cublasLtMatmulDescOpaque_t product;
  cublasLtMatrixLayoutOpaque_t a, b, c, d;

  /// Of `count` products, whose matrices lie so many elements apart.
  void repeat(const Product& p, int count, int64_t a_apart, int64_t b_apart, int64_t c_apart) {
    const auto set = [&](cublasLtMatrixLayoutOpaque_t& layout, int64_t apart) {
      check_blas(cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                  &count, sizeof count),
                 "MatrixLayoutSetAttribute", p);
      check_blas(cublasLtMatrixLayoutSetAttribute(
                     &layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &apart, sizeof apart),
                 "MatrixLayoutSetAttribute", p);
    };
    set(a, a_apart), set(b, b_apart), set(c, c_apart), set(d, c_apart);
  }

  Descriptors(const Product& p, const Tensor& ta, const Tensor& tb) {
    check_blas(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "MatmulDescInit",
               p);
    set_op(p, CUBLASLT_MATMUL_DESC_TRANSA, p.op_b);
    set_op(p, CUBLASLT_MATMUL_DESC_TRANSB, p.op_a);
    set_layout(p, a, p.in, ta.cols(), ta.rows(), p.a_pitch);
    set_layout(p, b, p.in, tb.cols(), tb.rows(), p.b_pitch);
    set_layout(p, c, p.out, p.n, p.m, p.c_pitch);
    set_layout(p, d, p.out, p.n, p.m, p.d_pitch);
  }

 private:
  void set_op(const Product& p, cublasLtMatmulDescAttributes_t attribute, Op op) {
    const cublasOperation_t value = op == Op::none ? CUBLAS_OP_N : CUBLAS_OP_T;
    check_blas(cublasLtMatmulDescSetAttribute(&product, attribute, &value, sizeof value),
               "MatmulDescSetAttribute", p);
  }
  static void set_layout(const Product& p, cublasLtMatrixLayoutOpaque_t& layout, DType dtype,
                         int64_t rows, int64_t cols, int64_t pitch) {
    check_blas(cublasLtMatrixLayoutInit(&layout, data_type(dtype), static_cast<uint64_t>(rows),
                                        static_cast<uint64_t>(cols), pitch),
               "MatrixLayoutInit", p);
  }
};

cublasLtHandle_t handle(const Product& p) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard lock(mutex);
  auto [entry, created] = handles.try_emplace(p.device, nullptr);
  if (entry->second == nullptr) check_blas(cublasLtCreate(&entry->second), "cublasLtCreate", p);
  return entry->second;
}

/// The product whose algorithm is taken. One that may split K is an adapter's own: its choice may
/// not depend on pitches, which grow with the adapters of the others in a gang. Every pitch is a
/// multiple of 16 bytes then, which is all that an algorithm asks.
Product canonical(Product p) {
  const int64_t per_16_bytes = p.in == DType::f32 ? 4 : 8;
  if (p.split_k == SplitK::no || p.a_pitch % per_16_bytes != 0 || p.b_pitch % per_16_bytes != 0 ||
      p.c_pitch % per_16_bytes != 0 || p.d_pitch % per_16_bytes != 0)
    return p;
  const auto next = [](int64_t cols) { return (cols + 63) / 64 * 64; };
  p.a_pitch = next(p.op_a == Op::none ? p.k : p.m);
  p.b_pitch = next(p.op_b == Op::none ? p.n : p.k);
  p.c_pitch = p.d_pitch = next(p.n);
  return p;
}

struct Proposals {
  std::array<cublasLtMatmulHeuristicResult_t, GemmProposal::most> results;
  int count = 0;

  const cublasLtMatmulAlgo_t& operator[](int i) const {
    return results[static_cast<size_t>(i)].algo;
  }
};

/// What the library proposes of the algorithms allowed, `most` at most, its own choice first.
Proposals proposals(const Product& p, Descriptors& d, uint32_t reductions, int most) {
  cublasLtMatmulPreferenceOpaque_t preference;
  check_blas(cublasLtMatmulPreferenceInit(&preference), "MatmulPreferenceInit", p);
  const auto set = [&]<class V>(cublasLtMatmulPreferenceAttributes_t attribute, V value) {
    check_blas(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value),
               "MatmulPreferenceSetAttribute", p);
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(p.workspace_bytes));
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(p.b_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(p.a_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(p.d_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(p.c_alignment));
  Proposals found;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle(p), &d.product, &d.b, &d.a, &d.d, &d.c, &preference,
                                     most, found.results.data(), &found.count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  check_blas(status, "cublasLtMatmulAlgoGetHeuristic", p);
  const auto end =
      std::remove_if(found.results.begin(), found.results.begin() + found.count,
                     [](const auto& result) { return result.state != CUBLAS_STATUS_SUCCESS; });
  found.count = static_cast<int>(end - found.results.begin());
  return found;
}

GemmTiling tiling_of(const cublasLtMatmulAlgo_t& algorithm, const Product& p) {
  const auto get = [&]<class V>(cublasLtMatmulAlgoConfigAttributes_t attribute, V value) {
    size_t written = 0;
    check_blas(
        cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof value, &written),
        "MatmulAlgoConfigGetAttribute", p);
    return static_cast<int>(value);
  };
  return {.tile = get(CUBLASLT_ALGO_CONFIG_TILE_ID, uint32_t{}),
          .cluster = get(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, uint16_t{}),
          .option = get(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, uint32_t{})};
}

/// A kernel that does not cut K: the proposal that p asks for, or the measured one if it is
/// offered, or else the library's choice. False when it offers none.
bool whole_sums(cublasLtMatmulAlgo_t& algorithm, const Product& p, Descriptors& d) {
  std::optional<GemmTiling> measured;
  if (p.proposal < 0 && p.op_a == Op::none && p.in == DType::bf16 && p.out == DType::bf16)
    measured = gemm_tiling(measured_gemm_lines(), device_name(p.device), p.op_b, p.m, p.n, p.k);
  const int most = measured || p.proposal > 0 ? GemmProposal::most : 1;
  const Proposals offered = proposals(p, d, CUBLASLT_REDUCTION_SCHEME_NONE, most);
  QLAB_CHECK(p.proposal < std::max(1, offered.count),
             "[gemm] the library proposes {} kernels, none of number {} (M {}, N {}, K {})",
             offered.count, p.proposal, p.m, p.n, p.k);
  if (offered.count == 0) return false;
  int number = std::max(0, p.proposal);
  for (int i = 0; measured && i < offered.count; ++i)
    if (tiling_of(offered[i], p) == *measured) {
      number = i;
      break;
    }
  algorithm = offered[number];
  return true;
}

/// No split of K unless allowed or all there is: then its parts are added in a fixed order in fp32.
/// With one row there is no other whose bits it should share, and without a split few blocks read
/// the weights (N 4096, K 14336 took 312 us of an H100 that copies as many bytes in 40).
cublasLtMatmulAlgo_t choose(const Product& p, Descriptors& d) {
  static std::mutex mutex;
  static std::map<Product, cublasLtMatmulAlgo_t> chosen;
  const std::lock_guard lock(mutex);
  if (const auto known = chosen.find(p); known != chosen.end()) return known->second;
  cublasLtMatmulAlgo_t algorithm;
  if (p.split_k == SplitK::allowed || p.m == 1 || !whole_sums(algorithm, p, d)) {
    const Proposals offered = proposals(p, d, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 1);
    if (offered.count == 0)
      check_blas(CUBLAS_STATUS_NOT_SUPPORTED, "the search for an algorithm", p);
    algorithm = offered[0];
  }
  chosen.emplace(p, algorithm);
  return algorithm;
}

Product describe(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b,
                 const Tensor& addend, SplitK split_k, const Tensor& workspace) {
  return {.m = c.rows(),
          .n = c.cols(),
          .k = op_a == Op::none ? a.cols() : a.rows(),
          .a_pitch = pitch_of(a),
          .b_pitch = pitch_of(b),
          .c_pitch = pitch_of(c),
          .d_pitch = pitch_of(addend),
          .a_alignment = alignment_of(a),
          .b_alignment = alignment_of(b),
          .c_alignment = alignment_of(c),
          .d_alignment = alignment_of(addend),
          .workspace_bytes = workspace.defined() ? workspace.bytes() : 0,
          .op_a = op_a,
          .op_b = op_b,
          .split_k = split_k,
          .in = a.dtype(),
          .out = c.dtype(),
          .device = c.device().index,
          .proposal = GemmProposal::current()};
}

void multiply(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
              float beta, const Tensor& addend, SplitK split_k, const Tensor& workspace) {
  const Product p = describe(c, a, op_a, b, op_b, addend, split_k, workspace);
  Descriptors d(p, a, b);
  const Product asked = canonical(p);
  Descriptors shapes(asked, a, b);
  const cublasLtMatmulAlgo_t algorithm = choose(asked, shapes);
  if (beta == 0 || addend.raw() != c.raw()) fill_for_initcheck(c);
  check_blas(cublasLtMatmul(handle(p), &d.product, &alpha, b.raw(), &d.b, a.raw(), &d.a, &beta,
                            addend.raw(), &d.d, c.raw(), &d.c, &algorithm,
                            workspace.defined() ? workspace.raw() : nullptr,
                            static_cast<size_t>(p.workspace_bytes), current_stream()),
             "cublasLtMatmul", p);
}

}  // namespace

void gemm(const Tensor& c, const Tensor& a, Op op_a, const Tensor& b, Op op_b, float alpha,
          float beta, const Tensor& addend, SplitK split_k, const Tensor& workspace) {
  if (c.numel() == 0) return;
  const int64_t k = op_a == Op::none ? a.cols() : a.rows();
  if (a.dtype() != DType::f32 || k <= f32_chain)
    return multiply(c, a, op_a, b, op_b, alpha, beta, addend, split_k, workspace);
  for (int64_t begin = 0; begin < k; begin += f32_chain) {
    const int64_t end = std::min(begin + f32_chain, k);
    const Tensor a_part = op_a == Op::none ? a.slice_cols(begin, end) : a.slice_rows(begin, end);
    const Tensor b_part = op_b == Op::none ? b.slice_rows(begin, end) : b.slice_cols(begin, end);
    multiply(c, a_part, op_a, b_part, op_b, alpha, begin == 0 ? beta : 1.0f,
             begin == 0 ? addend : c, split_k, workspace);
  }
}

std::vector<GemmTiling> gemm_proposals(const Tensor& c, const Tensor& a, const Tensor& b, Op op_b,
                                       const Tensor& workspace) {
  const Product p = describe(c, a, Op::none, b, op_b, c, SplitK::no, workspace);
  Descriptors d(p, a, b);
  const Proposals offered = proposals(p, d, CUBLASLT_REDUCTION_SCHEME_NONE, GemmProposal::most);
  std::vector<GemmTiling> tilings;
  for (int i = 0; i < offered.count; ++i) tilings.push_back(tiling_of(offered[i], p));
  return tilings;
}

// What one product takes is asked for, and then told to repeat: another algorithm would be another
// order of sums.
void gemm_each(std::span<const Factors> products, Op op_a, Op op_b, SplitK split_k,
               const Tensor& workspace) {
  const Factors& first = products.front();
  const Product p = describe(first.c, first.a, op_a, first.b, op_b, first.c, split_k, workspace);
  const auto apart = [&](Tensor Factors::*matrix, size_t i) {
    const auto at = [&](size_t j) { return static_cast<const char*>((products[j].*matrix).raw()); };
    return (at(i) - at(i - 1)) / static_cast<int64_t>(size_of((first.*matrix).dtype()));
  };
  const int64_t a_apart = apart(&Factors::a, 1), b_apart = apart(&Factors::b, 1),
                c_apart = apart(&Factors::c, 1);
  bool even = first.a.dtype() != DType::f32 && p.k > 0;
  for (size_t i = 1; even && i < products.size(); ++i) {
    const Factors& f = products[i];
    even = describe(f.c, f.a, op_a, f.b, op_b, f.c, split_k, workspace) == p &&
           apart(&Factors::a, i) == a_apart && apart(&Factors::b, i) == b_apart &&
           apart(&Factors::c, i) == c_apart;
  }
  if (even) {
    const Product asked = canonical(p);
    Descriptors shapes(asked, first.a, first.b), d(p, first.a, first.b);
    const cublasLtMatmulAlgo_t algorithm = choose(asked, shapes);
    d.repeat(p, static_cast<int>(products.size()), a_apart, b_apart, c_apart);
    cublasLtMatmulHeuristicResult_t able;
    if (cublasLtMatmulAlgoCheck(handle(p), &d.product, &d.b, &d.a, &d.d, &d.c, &algorithm, &able) ==
            CUBLAS_STATUS_SUCCESS &&
        able.workspaceSize <= static_cast<size_t>(p.workspace_bytes)) {
      const float one = 1, zero = 0;
      for (const Factors& f : products) fill_for_initcheck(f.c);
      check_blas(
          cublasLtMatmul(handle(p), &d.product, &one, first.b.raw(), &d.b, first.a.raw(), &d.a,
                         &zero, first.c.raw(), &d.d, first.c.raw(), &d.c, &algorithm,
                         workspace.raw(), static_cast<size_t>(p.workspace_bytes), current_stream()),
          "cublasLtMatmul of several", p);
      return;
    }
  }
  for (const Factors& f : products)
    gemm(f.c, f.a, op_a, f.b, op_b, 1.0f, 0.0f, f.c, split_k, workspace);
}

}  // namespace qlab::cuda
