#include "data/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "core/parallel.h"
#include "data/encoding.h"
#include "data/json.h"

namespace qlab {
namespace {

constexpr uint64_t length_bytes = 8;
constexpr uint64_t max_header_bytes = 100'000'000;

/// In the order of the reference writer, which puts later ones first.
struct StoredType {
  const char* name;
  int bits;
};
constexpr StoredType stored_types[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64}};

const StoredType* find_stored_type(const std::string& name) {
  for (const StoredType& type : stored_types)
    if (name == type.name) return &type;
  return nullptr;
}

const char* stored_name(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "F64";
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::f16:
      return "F16";
    case DType::i64:
      return "I64";
    case DType::i32:
      return "I32";
    case DType::u8:
      return "U8";
  }
  return "";
}

std::optional<Encoding> float_encoding(const std::string& dtype) {
  if (dtype == "F64") return Encoding::f64;
  if (dtype == "F32") return Encoding::f32;
  if (dtype == "F16") return Encoding::f16;
  if (dtype == "BF16") return Encoding::bf16;
  return std::nullopt;
}

uint64_t unsigned_number(const nlohmann::json& value, const std::string& where, const char* what) {
  if (!value.is_number_unsigned()) fail("{}: {} must be a non-negative integer", where, what);
  return value.get<uint64_t>();
}

SafetensorsEntry parse_entry(const nlohmann::json& json, const std::string& where) {
  if (!json.is_object() || !json.contains("dtype") || !json.contains("shape") ||
      !json.contains("data_offsets") || json.size() != 3)
    fail("{}: must be an object with dtype, shape and data_offsets", where);
  const auto &dtype = json["dtype"], &shape = json["shape"], &offsets = json["data_offsets"];
  if (!dtype.is_string()) fail("{}: dtype must be a string", where);
  if (!shape.is_array()) fail("{}: shape must be an array", where);
  if (!offsets.is_array() || offsets.size() != 2)
    fail("{}: data_offsets must be an array of two numbers", where);

  SafetensorsEntry entry;
  entry.dtype = dtype.get<std::string>();
  entry.begin = unsigned_number(offsets[0], where, "data_offsets");
  entry.end = unsigned_number(offsets[1], where, "data_offsets");
  const StoredType* type = find_stored_type(entry.dtype);
  if (type == nullptr) fail("{}: unknown dtype \"{}\"", where, entry.dtype);
  uint64_t bits = static_cast<uint64_t>(type->bits);
  for (const auto& dim : shape) {
    const uint64_t d = unsigned_number(dim, where, "a dimension");
    if (d > std::numeric_limits<int64_t>::max() || __builtin_mul_overflow(bits, d, &bits))
      fail("{}: shape {} is too large", where, shape.dump());
    entry.shape.push_back(static_cast<int64_t>(d));
  }
  if (entry.end < entry.begin) fail("{}: data ends before it begins", where);
  if (bits % 8 != 0 || bits / 8 != entry.end - entry.begin)
    fail("{}: {} {} needs {} bits, the file holds {} bytes", where, entry.dtype, shape.dump(), bits,
         entry.end - entry.begin);
  return entry;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

Shape to_shape(const std::vector<int64_t>& shape, const std::string& where) {
  if (shape.size() > Shape::max_rank)
    fail("{}: shape {} has more than {} dimensions", where, shape_text(shape), Shape::max_rank);
  Shape result;
  for (int64_t d : shape) result.push_back(d);
  return result;
}

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  if (file_.size() < length_bytes) fail("{}: truncated: {} bytes", path, file_.size());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file_.bytes().data(), length_bytes);
  if (header_bytes > max_header_bytes || header_bytes > file_.size() - length_bytes)
    fail("{}: the header claims {} bytes, the file has {}: truncated, or not safetensors", path,
         header_bytes, file_.size());
  data_begin_ = length_bytes + header_bytes;
  const std::string_view text(reinterpret_cast<const char*>(file_.bytes().data()) + length_bytes,
                              header_bytes);
  if (!text.starts_with('{')) fail("{}: the header does not start with {{", path);
  const nlohmann::json header = parse_json(text, path);
  for (const auto& [name, value] : header.items()) {
    const std::string where = fmt::format("{}: tensor \"{}\"", path, name);
    if (name != "__metadata__") {
      entries_[name] = parse_entry(value, where);
      continue;
    }
    if (!value.is_object()) fail("{}: __metadata__ must be an object", path);
    for (const auto& [key, text_value] : value.items()) {
      if (!text_value.is_string()) fail("{}: __metadata__ \"{}\" must be a string", path, key);
      metadata_[key] = text_value.get<std::string>();
    }
  }
  check_layout(file_.size() - data_begin_);
}

void SafetensorsFile::check_layout(uint64_t data_bytes) const {
  std::vector<const std::pair<const std::string, SafetensorsEntry>*> order;
  for (const auto& item : entries_) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t position = 0;
  for (const auto* item : order) {
    const auto& [name, entry] = *item;
    if (entry.begin != position)
      fail("{}: tensor \"{}\" begins at byte {} of the data, expected {}: {}", path(), name,
           entry.begin, position, entry.begin < position ? "tensors overlap" : "there is a hole");
    position = entry.end;
  }
  if (position != data_bytes)
    fail("{}: the tensors need {} bytes of data, the file has {}: {}", path(), position, data_bytes,
         position > data_bytes ? "truncated; fetch it again" : "surplus bytes at the end");
}

const SafetensorsEntry& SafetensorsFile::entry(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail("{}: there is no tensor \"{}\"", path(), name);
  return found->second;
}

Bytes SafetensorsFile::bytes(const std::string& name) const {
  const SafetensorsEntry& e = entry(name);
  return file_.bytes().subspan(data_begin_ + e.begin, e.end - e.begin);
}

Tensor SafetensorsFile::read(const std::string& name, DType dtype) const {
  const SafetensorsEntry& e = entry(name);
  const std::string where = fmt::format("{}: tensor \"{}\"", path(), name);
  const Bytes source = bytes(name);
  Tensor tensor = Tensor::empty(to_shape(e.shape, where), dtype, Device::cpu());
  if (e.dtype == stored_name(dtype)) {
    parallel_for(static_cast<int64_t>(source.size()), 1 << 20, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<std::byte*>(tensor.raw()) + begin, source.data() + begin,
                  static_cast<size_t>(end - begin));
    });
    return tensor;
  }
  const std::optional<Encoding> encoding = float_encoding(e.dtype);
  const bool to_float = dtype == DType::f64 || dtype == DType::f32 || dtype == DType::bf16;
  if (!encoding || !to_float) fail("{}: cannot read {} as {}", where, e.dtype, name_of(dtype));
  const int64_t source_bytes = info_of(*encoding).block_bytes;
  const int64_t target_bytes = static_cast<int64_t>(size_of(dtype));
  parallel_for(tensor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    decode(*encoding, source.data() + begin * source_bytes, end - begin, dtype,
           static_cast<std::byte*>(tensor.raw()) + begin * target_bytes);
  });
  return tensor;
}

namespace {

int writing_order(DType dtype) {
  return static_cast<int>(find_stored_type(stored_name(dtype)) - stored_types);
}

}  // namespace

void write_safetensors(const std::string& path,
                       const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<const std::pair<std::string, Tensor>*> order;
  for (const auto& item : tensors) {
    QLAB_CHECK(item.second.device().is_cpu() && item.second.contiguous(),
               "{}: tensor \"{}\" must be contiguous and on the CPU", path, item.first);
    order.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    const int rank_a = writing_order(a->second.dtype()), rank_b = writing_order(b->second.dtype());
    return rank_a != rank_b ? rank_a > rank_b : a->first < b->first;
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t position = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    QLAB_CHECK(!header.contains(name), "{}: two tensors are called \"{}\"", path, name);
    std::vector<int64_t> dims;
    for (int i = 0; i < tensor.rank(); ++i) dims.push_back(tensor.dim(i));
    header[name] = {{"dtype", stored_name(tensor.dtype())},
                    {"shape", dims},
                    {"data_offsets", {position, position + tensor.bytes()}}};
    position += tensor.bytes();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t header_bytes = text.size();

  AtomicFile file(path);
  file.write(std::as_bytes(std::span(&header_bytes, 1)));
  file.write(text);
  for (const auto* item : order)
    file.write(Bytes(static_cast<const std::byte*>(item->second.raw()),
                     static_cast<size_t>(item->second.bytes())));
  file.commit();
}

}  // namespace qlab
