// LoRA (Hu et al. 2021, eq. 3), with PEFT's semantics:
//   y = W x + scale B A dropout(x),   A [r, in], B [out, r],   scale = alpha / r or alpha / sqrt(r)
// A starts uniform in +-1/sqrt(in), B at zero. nn/linear.h computes with them.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace qlab {

struct LoraSpec {
  int64_t r = 16;
  double alpha = 32;
  double dropout = 0;
  bool rslora = false;
  DType dtype = DType::f32;            // of the stored adapter; bf16: rounded after every update
  std::string pattern = "all-linear";  // keyword or regex over the full name; "" with names
  std::vector<std::string> names;      // full names, or suffixes that begin a segment
  double scale() const;
};

/// Indices of `linears` that get an adapter. Keywords: attention (q, k, v, o), mlp, all-linear, qk,
/// qv. Error when nothing matches, with the names that exist.
std::vector<int> resolve_targets(const LoraSpec& spec, const std::vector<std::string>& linears);

struct LoraModule {
  Tensor a, b;                  // fp32 [r, in], [out, r]: views of the adapter's flat buffer
  Tensor da, db;                // gradients, accumulated
  Tensor a_compute, b_compute;  // in the compute dtype; a and b themselves in fp32
  float scale = 1;
  uint64_t dropout_key = 0;
};

/// All LoRA parameters of one trial in one flat fp32 buffer, with gradients beside it.
class Adapter {
 public:
  struct Shape {
    int index;
    std::string name;
    int64_t in, out;
  };
  /// Initialized from `init_seed` by (module, row, column), so that rank 4 is the first rows of
  /// rank 8. `device` may be meta.
  Adapter(const LoraSpec& spec, const std::vector<Shape>& modules, uint64_t init_seed,
          uint64_t dropout_seed, DType compute, Device device);

  const LoraModule* find(int linear) const;
  const LoraSpec& spec() const { return spec_; }
  const std::vector<Shape>& modules() const { return shapes_; }
  const Tensor& parameters() const { return parameters_; }  // fp32 [n]
  const Tensor& gradients() const { return gradients_; }    // fp32 [n]
  int64_t parameter_count() const { return parameters_.numel(); }
  /// Elements of A and B of each module, in the order of the flat buffer.
  std::vector<int64_t> sizes() const;
  /// The views of one module by name, for files.
  const LoraModule& module(const std::string& name) const;
  /// Rounds to lora.dtype and renews the compute copies; after every change of parameters().
  void refresh() const;

 private:
  LoraSpec spec_;
  std::vector<Shape> shapes_;
  Tensor parameters_, gradients_, compute_;
  std::map<int, LoraModule> modules_;
};

}  // namespace qlab
