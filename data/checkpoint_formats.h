// The two readers behind Checkpoint::open.
#pragma once
#include <algorithm>
#include <memory>
#include <string>

#include "data/checkpoint.h"
#include "data/file.h"

namespace qlab {

std::unique_ptr<Checkpoint> open_huggingface_directory(const std::string& directory);
std::unique_ptr<Checkpoint> open_gguf(const std::string& path);

/// The part of a tensor's bytes that goes into a model's fingerprint.
inline void add_ends(Fingerprint& fingerprint, Bytes bytes) {
  constexpr size_t mib = size_t{1} << 20;
  fingerprint.add(static_cast<uint64_t>(bytes.size()));
  fingerprint.add(bytes.first(std::min(bytes.size(), mib)));
  fingerprint.add(bytes.last(std::min(bytes.size(), mib)));
}

}  // namespace qlab
