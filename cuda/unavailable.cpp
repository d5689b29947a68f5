// What the program links where there is no fitting CUDA compiler: no device is reported, and every
// port that a device would be needed for throws. One line per function.
#include "core/device.h"
#include "core/error.h"
#include "core/ops/add.h"
#include "core/ops/attention.h"
#include "core/ops/copy.h"
#include "core/ops/cross_entropy.h"
#include "core/ops/dropout.h"
#include "core/ops/gemm_tiling.h"
#include "core/ops/rms_norm.h"
#include "core/ops/rope.h"
#include "core/ops/rows.h"
#include "core/ops/swiglu.h"
#include "core/profile.h"
#include "core/replicas.h"
#include "nn/adapter_products.h"
#include "nn/fold.h"
#include "optim/adamw.h"
#include "optim/adamw8bit.h"
#include "quant/nf4_linear.h"
#include "quant/quantize.h"

namespace qlab::cuda {
namespace {

using In = const Tensor&;

[[noreturn]] void missing() {
  fail(
      "this qlab was built without CUDA: install the CUDA Toolkit 12.4 or newer (its nvcc in PATH, "
      "in /usr/local/cuda or named by CUDACXX) and run `make` again, or use --device cpu");
}

}  // namespace

// core/device.h
int device_count() { return 0; }
std::string build_version() { return ""; }
std::string device_name(int) { missing(); }
bool supports_bf16(int) { missing(); }
int compute_capability(int) { missing(); }
MemoryInfo memory_info(int) { missing(); }
void set_device(int) { missing(); }
void* allocate(size_t, int) { missing(); }
void release(void*, int) { missing(); }
void* allocate_pinned(size_t) { missing(); }
void release_pinned(void*) { missing(); }
void copy_async(void*, const void*, size_t) { missing(); }
void upload(void*, const void*, size_t) { missing(); }
void copy_rows(void*, size_t, const void*, size_t, size_t, size_t) { missing(); }
void fill_zero(void*, size_t, size_t, size_t) { missing(); }
void synchronize() { missing(); }
int64_t mark() { missing(); }
double seconds_between(int64_t, int64_t) { missing(); }
void clear_marks() { missing(); }
void push_range(const char*) { missing(); }
void pop_range() { missing(); }
void start_external_profiler() { missing(); }
void stop_external_profiler() { missing(); }
void fold_adapters(In, int64_t, std::span<const FoldPart>) { missing(); }
bool adapter_kernels_present() { return true; }
void adapter_forward(In, In, In, const AdapterRows&, In) { missing(); }
void adapter_out_gradients(In, In, In, In, const AdapterRows&, In) { missing(); }
void adapter_in_gradients(In, In, const AdapterRows&, In) { missing(); }
void adapter_add_da(In, const AdapterRows&) { missing(); }
void adapter_input_gradient(In, In, In, const AdapterRows&) { missing(); }
Graph::Graph(const std::function<void()>&) { missing(); }
Graph::~Graph() = default;
void Graph::launch() const { missing(); }
CopyStream::CopyStream() { missing(); }
CopyStream::~CopyStream() = default;
void CopyStream::copy(void*, const void*, size_t) { missing(); }
Event::Event() { missing(); }
Event::~Event() = default;
void Event::record(const CopyStream*) { missing(); }
void Event::wait(const CopyStream*) const { missing(); }
double Event::seconds_until(const Event&) const { missing(); }
std::string why_no_nccl() { return "this qlab was built without CUDA"; }
std::string Communicator::new_id() { missing(); }
Communicator::Communicator(const std::string&, int, int) { missing(); }
Communicator::~Communicator() = default;
void Communicator::gather(float*, const float*, size_t) const { missing(); }
Stopwatch::Stopwatch() { missing(); }
Stopwatch::~Stopwatch() = default;
void Stopwatch::start() { missing(); }
double Stopwatch::seconds() { missing(); }

// core/ops
void add(In, In, In) { missing(); }
void scale(In, float) { missing(); }
void add_bias(In, In) { missing(); }
void attention(In, In, In, In, In, In, In, const AttentionShape&, In) { missing(); }
void attention_backward(In, In, In, In, In, In, In, In, In, In, In, const AttentionShape&, In) {
  missing();
}
void cast(In, In) { missing(); }
void cross_entropy(In, In, In, In) { missing(); }
void dropout(In, In, In, In, DropoutKey, bool) { missing(); }
void gemm(In, In, Op, In, Op, float, float, In, SplitK, In) { missing(); }
void gemm_each(std::span<const Factors>, Op, Op, SplitK, In) { missing(); }
std::vector<GemmTiling> gemm_proposals(In, In, In, Op, In) { missing(); }
void rms_norm(In, In, In, In, float) { missing(); }
void rms_norm_backward(In, In, In, In, In, In) { missing(); }
void rope(In, In, In, In, int64_t, bool) { missing(); }
void gather_rows(In, In, In) { missing(); }
void scatter_rows(In, In, In) { missing(); }
void swiglu(In, In) { missing(); }
void swiglu_backward(In, In, In) { missing(); }

// quant and optim
void quantize_nf4(In, In, In, In, int64_t) { missing(); }
void quantize_scales(const Nf4Tensor&, In, In) { missing(); }
void dequantize_nf4(In, const Nf4Tensor&) { missing(); }
void nf4_matmul_simt(In, In, const Nf4Tensor&, Op, In, In) { missing(); }
void nf4_matmul_mma(In, In, const Nf4Tensor&, Op, In, In) { missing(); }
bool nf4_wgmma_available() { return true; }
void nf4_matmul_lut(In, In, const Nf4Tensor&, In) { missing(); }
void nf4_matmul_wgmma(In, In, const Nf4Tensor&, Op, int, In, In) { missing(); }
void grad_norm(std::span<const GradNorm>) { missing(); }
void adamw(std::span<const AdamWUpdate>) { missing(); }
void adamw8bit(std::span<const AdamW8Update>) { missing(); }

}  // namespace qlab::cuda
