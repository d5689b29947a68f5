// From a path to a model: checkpoints through data/checkpoint.h, synthetic ones from a seed.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "nn/llama.h"

namespace qlab {

/// What `model.path` names, opened but not read.
struct ModelSource {
  std::string path;
  LlamaConfig config;
  bool shapes_alone = false;
  TensorSource read;      // f32, or bf16 where the checkpoint has it, on the CPU
  TensorSource on_paper;  // the same on the CPU's meta device
  /// Of configuration and tensors: reads the whole model, with calls of its argument on the way.
  std::function<std::string(const std::function<void()>&)> fingerprint;
};

/// DIR, FILE.gguf, a hub id, or synthetic:NAME (seeded normal weights of standard deviation 0.02).
ModelSource open_model(const std::string& path);
/// The same or, of a directory without weights, what its config.json says: nothing can be read.
ModelSource open_shapes(const std::string& path);

/// Reads the weights; for a meta device nothing is read, and accounts show what loading takes.
std::unique_ptr<Llama> load_llama(const ModelSource& source, const WeightSpec& spec, DType compute,
                                  Device device, bool host_embeddings = false,
                                  int64_t streamed_layers = 0);

/// "" or a warning that the source's weights already lie on a 4-bit grid.
std::string requantization_warning(const ModelSource& source, const WeightSpec& spec);

}  // namespace qlab
