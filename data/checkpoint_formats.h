// The two readers behind Checkpoint::open.
#pragma once
#include <memory>
#include <string>

#include "data/checkpoint.h"

namespace qlab {

std::unique_ptr<Checkpoint> open_huggingface_directory(const std::string& directory);
std::unique_ptr<Checkpoint> open_gguf(const std::string& path);

}  // namespace qlab
