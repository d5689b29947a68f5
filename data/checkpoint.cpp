#include "data/checkpoint.h"

#include <fmt/ranges.h>

#include <cstdlib>
#include <filesystem>
#include <set>

#include "core/error.h"
#include "data/checkpoint_formats.h"
#include "data/file.h"

namespace qlab {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

fs::path hub_cache() {
  if (const std::string cache = environment("HF_HUB_CACHE"); !cache.empty()) return cache;
  if (const std::string home = environment("HF_HOME"); !home.empty()) return fs::path(home) / "hub";
  if (const std::string cache = environment("XDG_CACHE_HOME"); !cache.empty())
    return fs::path(cache) / "huggingface" / "hub";
  return fs::path(environment("HOME")) / ".cache" / "huggingface" / "hub";
}

/// "org/name", with the characters that the hub allows.
bool looks_like_hub_id(const std::string& text) {
  const auto allowed = [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.' || c == '/';
  };
  const size_t slash = text.find('/');
  return slash != std::string::npos && slash > 0 && slash + 1 < text.size() &&
         text.find('/', slash + 1) == std::string::npos && text[0] != '.' && text[0] != '~' &&
         !is_gguf_path(text) && std::all_of(text.begin(), text.end(), allowed);
}

std::string strip(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

}  // namespace

bool is_gguf_path(const std::string& path) { return path.ends_with(".gguf"); }

std::string fetch_remedy(const std::string& directory) {
  std::set<std::string> files;
  for (const auto& entry : fs::directory_iterator(directory))
    if (is_gguf_path(entry.path().string())) files.insert(entry.path().string());
  if (!files.empty()) return fmt::format("did you mean {}?", fmt::join(files, " or "));
  const fs::path snapshot = fs::path(directory).lexically_normal();
  std::string id = snapshot.parent_path().parent_path().filename().string();
  const std::string prefix = "models--";
  if (snapshot.parent_path().filename() != "snapshots" || !id.starts_with(prefix))
    return "fetch the whole model again (config.json, *.safetensors, tokenizer*.json)";
  id.erase(0, prefix.size());
  if (const size_t dashes = id.find("--"); dashes != std::string::npos) id.replace(dashes, 2, "/");
  return "download the rest with:\n  hf download " + id;
}

std::string resolve_model_path(const std::string& path, bool shapes) {
  if (fs::exists(path)) return path;
  const auto no_such_file = [&] {
    fail(
        "{}: there is no such file or directory (a model is a directory with config.json, a .gguf "
        "file, or a hub id org/name)",
        path);
  };
  if (!looks_like_hub_id(path)) no_such_file();
  std::string folder = "models--" + path;
  folder.replace(folder.find('/'), 1, "--");
  const fs::path cached = hub_cache() / folder;
  const fs::path reference = cached / "refs" / "main";
  if (fs::is_regular_file(reference)) {
    const fs::path snapshot = cached / "snapshots" / strip(read_text_file(reference.string()));
    if (fs::is_directory(snapshot)) return snapshot.string();
  }
  if (fs::is_directory(fs::path(path).parent_path())) no_such_file();  // models/name
  fail(
      "{}: neither a file or directory nor a model in the local cache {}; {} with:\n"
      "  hf download {}{}",
      path, hub_cache().string(),
      shapes ? "a prediction needs its config.json alone, and its tokenizer for the lengths of "
               "data; download them"
             : "download it",
      path, shapes ? " config.json tokenizer.json tokenizer_config.json" : "");
}

std::unique_ptr<Checkpoint> Checkpoint::open(const std::string& path) {
  const std::string found = resolve_model_path(path);
  if (fs::is_directory(found)) return open_huggingface_directory(found);
  if (is_gguf_path(found)) return open_gguf(found);
  fail("{}: is neither a directory with config.json nor a .gguf file", found);
}

void Checkpoint::check(const std::string& name, const Shape& expected) const {
  const Shape actual = shape(name);
  if (!(actual == expected))
    fail("{}: tensor \"{}\" has shape {}, the configuration says {}", file_of(name), name, actual,
         expected);
}

Tensor Checkpoint::read(const std::string& name, const Shape& expected, DType dtype) const {
  check(name, expected);
  return read(name, dtype);
}

}  // namespace qlab
