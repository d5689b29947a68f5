// The safetensors format: 8 bytes of little-endian header length N, N bytes of JSON (name to dtype,
// shape and byte range), then the data, without holes.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor.h"
#include "data/file.h"

namespace qlab {

struct SafetensorsEntry {
  std::string dtype;  // "F32", "BF16", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes, from the start of the data
};

/// A mapped file whose header has been checked in full; nothing in it can point outside.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  Bytes bytes(const std::string& name) const;
  /// A copy on the CPU, converted from F64, F32, F16 or BF16; integers only to their own dtype.
  Tensor read(const std::string& name, DType dtype) const;

 private:
  const SafetensorsEntry& entry(const std::string& name) const;
  void check_layout(uint64_t data_bytes) const;

  MappedFile file_;
  uint64_t data_begin_ = 0;
  std::map<std::string, SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Replaces `path` atomically. Tensors are on the CPU and contiguous; they are laid out as the
/// reference writer does, by descending dtype and then by name.
void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// "[2, 3]"
std::string shape_text(const std::vector<int64_t>& shape);
/// Error naming `where` when there are more than four dimensions.
Shape to_shape(const std::vector<int64_t>& shape, const std::string& where);

}  // namespace qlab
