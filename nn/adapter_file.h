// Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.
#pragma once
#include <string>

#include "nn/lora.h"

namespace qlab {

/// Writes both files into `dir`, each replaced atomically. `base` is recorded as the base model.
void save_adapter(const std::string& dir, const Adapter& adapter, const std::string& base);

/// Rank, alpha, scaling and targets of an adapter on disk. Settings that change the mathematics and
/// are not implemented (use_dora, rank_pattern, ...) are refused by name.
LoraSpec read_adapter_spec(const std::string& dir);

/// Fills the adapter's parameters from `dir`; shapes must agree, no tensor may be missing or left.
void load_adapter(const std::string& dir, const Adapter& adapter);

}  // namespace qlab
