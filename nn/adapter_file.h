// Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.
#pragma once
#include <string>

#include "nn/lora.h"

namespace qlab {

/// What an adapter's file holds, on the host (on its meta device for an adapter on meta); complete
/// once the adapter's device is synchronized.
std::vector<std::pair<std::string, Tensor>> adapter_tensors(const Adapter& adapter);

/// Writes both files into `dir`, each replaced atomically. `base` is recorded as the base model.
void save_adapter(const std::string& dir, const Adapter& adapter, const std::string& base);

/// Rank, alpha, scaling and targets of an adapter on disk. Settings that change the mathematics and
/// are not implemented (use_dora, rank_pattern, ...) are refused by name.
LoraSpec read_adapter_spec(const std::string& dir);

/// Refuses an adapter on disk that does not have exactly the tensors of these modules at rank r.
void check_adapter(const std::string& dir, const LoraSpec& spec,
                   const std::vector<Adapter::Shape>& modules);

/// Fills the adapter's parameters from `dir`, which must fit it and be finite.
void load_adapter(const std::string& dir, const Adapter& adapter);

}  // namespace qlab
