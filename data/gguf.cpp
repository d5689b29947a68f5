#include "data/gguf.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "core/error.h"

namespace qlab {
namespace {

enum class ValueType : uint32_t {
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  f32,
  boolean,
  string,
  array,
  u64,
  i64,
  f64
};

std::optional<Encoding> encoding_of(uint32_t ggml_type) {
  switch (ggml_type) {
    case 0:
      return Encoding::f32;
    case 1:
      return Encoding::f16;
    case 2:
      return Encoding::q4_0;
    case 3:
      return Encoding::q4_1;
    case 6:
      return Encoding::q5_0;
    case 7:
      return Encoding::q5_1;
    case 8:
      return Encoding::q8_0;
    case 12:
      return Encoding::q4_k;
    case 13:
      return Encoding::q5_k;
    case 14:
      return Encoding::q6_k;
    case 28:
      return Encoding::f64;
    case 30:
      return Encoding::bf16;
    default:
      return std::nullopt;
  }
}

/// Reads forward through the header; running past the end of the file is an Error.
class Cursor {
 public:
  Cursor(Bytes bytes, const std::string& path) : bytes_(bytes), path_(path) {}

  size_t position() const { return position_; }
  size_t left() const { return bytes_.size() - position_; }

  const std::byte* take(uint64_t n, const char* what) {
    if (n > left()) fail("{}: truncated at byte {}, in {}; fetch it again", path_, position_, what);
    const std::byte* p = bytes_.data() + position_;
    position_ += n;
    return p;
  }
  template <class T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }
  std::string string(const char* what) {
    const uint64_t n = number<uint64_t>(what);
    return {reinterpret_cast<const char*>(take(n, what)), n};
  }

  nlohmann::json value(uint32_t type, const std::string& key) {
    const char* what = key.c_str();
    switch (static_cast<ValueType>(type)) {
      case ValueType::u8:
        return number<uint8_t>(what);
      case ValueType::i8:
        return number<int8_t>(what);
      case ValueType::u16:
        return number<uint16_t>(what);
      case ValueType::i16:
        return number<int16_t>(what);
      case ValueType::u32:
        return number<uint32_t>(what);
      case ValueType::i32:
        return number<int32_t>(what);
      case ValueType::u64:
        return number<uint64_t>(what);
      case ValueType::i64:
        return number<int64_t>(what);
      case ValueType::f64:
        return number<double>(what);
      case ValueType::boolean:
        return number<uint8_t>(what) != 0;
      case ValueType::string:
        return string(what);
      case ValueType::array:
        return array(key);
      // The shortest decimal that gives this float: 1e-5 rather than 9.99999974e-06.
      case ValueType::f32:
        return std::stod(fmt::format("{}", number<float>(what)));
    }
    fail("{}: metadata \"{}\" has the unknown value type {}", path_, key, type);
  }

 private:
  nlohmann::json array(const std::string& key) {
    const uint32_t type = number<uint32_t>(key.c_str());
    const uint64_t count = number<uint64_t>(key.c_str());
    if (static_cast<ValueType>(type) == ValueType::array)
      fail("{}: metadata \"{}\": arrays of arrays are not supported", path_, key);
    if (count > left())
      fail("{}: metadata \"{}\" claims {} elements: truncated; fetch it again", path_, key, count);
    nlohmann::json result = nlohmann::json::array();
    for (uint64_t i = 0; i < count; ++i) result.push_back(value(type, key));
    return result;
  }

  Bytes bytes_;
  const std::string& path_;
  size_t position_ = 0;
};

uint64_t read_preamble(Cursor& cursor, const std::string& path, uint64_t& tensor_count) {
  if (cursor.left() < 4 || std::memcmp(cursor.take(4, "magic"), "GGUF", 4) != 0)
    fail("{}: is not a GGUF file", path);
  const uint32_t version = cursor.number<uint32_t>("version");
  if (version != 0 && (version & 0xffffu) == 0) fail("{}: big-endian GGUF is not supported", path);
  if (version != 2 && version != 3)
    fail("{}: GGUF version {} is not supported (2 and 3 are); convert the model again", path,
         version);
  tensor_count = cursor.number<uint64_t>("tensor count");
  return cursor.number<uint64_t>("metadata count");
}

/// `begin` is left relative to the data section.
GgufTensor read_description(Cursor& cursor, const std::string& where) {
  GgufTensor tensor;
  const uint32_t rank = cursor.number<uint32_t>("tensor rank");
  if (rank < 1 || rank > 4) fail("{}: has {} dimensions, 1 to 4 are possible", where, rank);
  uint64_t elems = 1;
  for (uint32_t i = 0; i < rank; ++i) {
    const uint64_t d = cursor.number<uint64_t>("tensor shape");
    if (d > (uint64_t{1} << 56) || __builtin_mul_overflow(elems, d, &elems) ||
        elems > (uint64_t{1} << 56))
      fail("{}: its shape is too large", where);
    tensor.shape.push_back(static_cast<int64_t>(d));
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  const uint32_t type = cursor.number<uint32_t>("tensor type");
  const std::optional<Encoding> encoding = encoding_of(type);
  if (!encoding)
    fail(
        "{}: GGUF type {} is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, "
        "Q5_K and Q6_K are",
        where, type);
  tensor.encoding = *encoding;
  const auto [name, block_elems, block_bytes] = info_of(*encoding);
  if (tensor.shape.back() % block_elems != 0)
    fail("{}: rows of {} elements do not divide into {} blocks of {}", where, tensor.shape.back(),
         name, block_elems);
  tensor.bytes = elems / static_cast<uint64_t>(block_elems) * static_cast<uint64_t>(block_bytes);
  tensor.begin = cursor.number<uint64_t>("tensor offset");
  return tensor;
}

}  // namespace

GgufFile::GgufFile(const std::string& path) : file_(path) {
  Cursor cursor(file_.bytes(), path);
  uint64_t tensor_count = 0;
  const uint64_t value_count = read_preamble(cursor, path, tensor_count);
  for (uint64_t i = 0; i < value_count; ++i) {
    const std::string key = cursor.string("a metadata key");
    const uint32_t type = cursor.number<uint32_t>("a metadata type");
    if (metadata_.contains(key)) fail("{}: metadata \"{}\" appears twice", path, key);
    metadata_[key] = cursor.value(type, key);
  }
  const uint64_t alignment = get<uint64_t>("general.alignment", 32);
  if (alignment == 0 || alignment % 8 != 0 || alignment > (1u << 30))
    fail("{}: general.alignment is {}, it must be a multiple of 8", path, alignment);
  for (uint64_t i = 0; i < tensor_count; ++i) {
    const std::string name = cursor.string("a tensor name");
    const std::string where = fmt::format("{}: tensor \"{}\"", path, name);
    if (!tensors_.emplace(name, read_description(cursor, where)).second)
      fail("{}: appears twice", where);
  }
  header_bytes_ = cursor.position();
  place_tensors(alignment);
}

void GgufFile::place_tensors(uint64_t alignment) {
  const uint64_t data_begin = (header_bytes_ + alignment - 1) / alignment * alignment;
  std::vector<std::pair<const std::string, GgufTensor>*> order;
  for (auto& item : tensors_) {
    auto& [name, tensor] = item;
    if (tensor.begin % alignment != 0)
      fail("{}: tensor \"{}\" is not aligned to {} bytes", path(), name, alignment);
    if (data_begin > file_.size() || tensor.begin > file_.size() - data_begin ||
        tensor.bytes > file_.size() - data_begin - tensor.begin)
      fail("{}: tensor \"{}\" reaches past the end of the file: truncated; fetch it again", path(),
           name);
    tensor.begin += data_begin;
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(),
            [](const auto* a, const auto* b) { return a->second.begin < b->second.begin; });
  for (size_t i = 1; i < order.size(); ++i) {
    const GgufTensor& before = order[i - 1]->second;
    if (before.begin + before.bytes > order[i]->second.begin)
      fail("{}: tensors \"{}\" and \"{}\" overlap", path(), order[i - 1]->first, order[i]->first);
  }
}

template <class T>
T GgufFile::get(const std::string& key) const {
  if (!metadata_.contains(key)) fail("{}: metadata \"{}\" is missing", path(), key);
  try {
    return metadata_.at(key).get<T>();
  } catch (const nlohmann::json::exception& e) {
    fail("{}: metadata \"{}\" has the wrong type: {}", path(), key, e.what());
  }
}

template bool GgufFile::get(const std::string&) const;
template int32_t GgufFile::get(const std::string&) const;
template int64_t GgufFile::get(const std::string&) const;
template uint64_t GgufFile::get(const std::string&) const;
template double GgufFile::get(const std::string&) const;
template std::string GgufFile::get(const std::string&) const;
template std::vector<std::string> GgufFile::get(const std::string&) const;
template std::vector<int32_t> GgufFile::get(const std::string&) const;

}  // namespace qlab
