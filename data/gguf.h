// The GGUF container, versions 2 and 3, little-endian: key-value metadata, tensor descriptions, and
// aligned tensor data.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/encoding.h"
#include "data/file.h"

namespace qlab {

struct GgufTensor {
  Encoding encoding = Encoding::f32;
  std::vector<int64_t> shape;     // row-major: the reverse of the order in the file
  uint64_t begin = 0, bytes = 0;  // begin: from the start of the file
};

/// A mapped file whose description has been checked in full; nothing in it can point outside.
class GgufFile {
 public:
  explicit GgufFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  /// One flat object, keys as in the file ("llama.block_count").
  const nlohmann::json& metadata() const { return metadata_; }
  const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }
  Bytes header() const { return file_.bytes().first(header_bytes_); }
  Bytes bytes(const GgufTensor& tensor) const {
    return file_.bytes().subspan(tensor.begin, tensor.bytes);
  }

  // Metadata with its type checked; Error naming the key. The second form has a default.
  template <class T>
  T get(const std::string& key) const;
  template <class T>
  T get(const std::string& key, const T& otherwise) const {
    return metadata_.contains(key) ? get<T>(key) : otherwise;
  }

 private:
  void place_tensors(uint64_t alignment);

  MappedFile file_;
  size_t header_bytes_ = 0;
  nlohmann::json metadata_ = nlohmann::json::object();
  std::map<std::string, GgufTensor> tensors_;
};

}  // namespace qlab
