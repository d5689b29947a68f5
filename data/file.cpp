#include "data/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"

namespace qlab {
namespace {

constexpr std::string_view temporary_end = ".tmp";
constexpr size_t tag_digits = 16;

std::string reason() { return std::strerror(errno); }

/// Closes a descriptor when it goes out of scope.
struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

uint64_t load_word(const std::byte* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

uint64_t absorb(uint64_t lane, uint64_t word) {
  return std::rotl(lane ^ word, 29) * 0x9e3779b97f4a7c15u;
}

uint64_t finish(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 32);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.value < 0) fail("{}: cannot open the file: {}", path, reason());
  struct stat status {};
  if (::fstat(file.value, &status) != 0) fail("{}: cannot read its size: {}", path, reason());
  if (!S_ISREG(status.st_mode)) fail("{}: is not a regular file", path);
  const auto size = static_cast<size_t>(status.st_size);
  if (size == 0) return;
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.value, 0);
  if (address == MAP_FAILED) fail("{}: cannot map the file: {}", path, reason());
  mapping_ = std::shared_ptr<void>(address, [size](void* p) { ::munmap(p, size); });
  bytes_ = {static_cast<const std::byte*>(address), size};
}

std::string read_text_file(const std::string& path) {
  const MappedFile file(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.size()};
}

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  // Random, since processes in containers have equal ids and may share the folder.
  do {
    uint64_t tag = 0;
    if (::getentropy(&tag, sizeof(tag)) != 0) fail("{}: no random name: {}", path_, reason());
    temporary_ = fmt::format("{}.{:0{}x}{}", path, tag, tag_digits, temporary_end);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  } while (descriptor_ < 0 && errno == EEXIST);
  const int error = errno;
  if (descriptor_ < 0)
    fail("{}: cannot create {}: {}{}", path_, temporary_, std::strerror(error), disk_remedy(error));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail_with_reason(const char* action) {
  const int error = errno;
  fail("{}: cannot {}: {}; the old file, if any, is untouched{}", path_, action,
       std::strerror(error), disk_remedy(error));
}

void AtomicFile::write(Bytes bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_with_reason("write");
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail_with_reason("flush to disk");
  const int closed = ::close(std::exchange(descriptor_, -1));
  if (closed != 0) fail_with_reason("close");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_with_reason("put in place");
  temporary_.clear();
  const std::filesystem::path folder = std::filesystem::path(path_).parent_path();
  const Descriptor directory{
      ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (directory.value >= 0)
    ::fsync(directory.value);  // some file systems cannot: the rename stands
}

std::optional<FileLock> FileLock::take(const std::string& path, bool wait) {
  FileLock lock(::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644));
  if (lock.descriptor_ < 0) fail("{}: cannot be written to: {}", path, reason());
  for (int tries = 0; ::flock(lock.descriptor_, LOCK_EX | (wait ? 0 : LOCK_NB)) != 0;) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) fail("{}: cannot be locked: {}", path, reason());
    // Who asks whether it is held has it for an instant.
    if (++tries == 10) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return lock;
}

bool FileLock::held(const std::string& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.value < 0) return errno != ENOENT;
  return ::flock(file.value, LOCK_SH | LOCK_NB) != 0;  // shared: two may ask at once
}

FileLock::FileLock(FileLock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

FileLock::~FileLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void remove_temporary_files(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.ends_with(temporary_end)) continue;
    const std::string_view rest(name.data(), name.size() - temporary_end.size());
    const size_t dot = rest.rfind('.');
    if (dot == rest.npos || dot + 1 == rest.size()) continue;
    const std::string_view tag = rest.substr(dot + 1);
    // Earlier versions: <process id>-<number>.
    const bool ours = tag.size() == tag_digits
                          ? tag.find_first_not_of("0123456789abcdef") == tag.npos
                          : tag.find_first_not_of("0123456789-") == tag.npos;
    if (ours) std::filesystem::remove(entry.path(), ignored);
  }
}

void flush_to_disk(const std::string& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.value < 0 || ::fsync(file.value) != 0)
    fail("{}: cannot be flushed to disk: {}", path, reason());
}

const char* disk_remedy(int error) {
  return error == ENOSPC || error == EDQUOT ? "; free some space and run the same command again"
                                            : "";
}

void write_file_atomically(const std::string& path, Bytes bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomically(const std::string& path, std::string_view text) {
  write_file_atomically(path, std::as_bytes(std::span(text)));
}

Fingerprint& Fingerprint::add(Bytes bytes) {
  add(static_cast<uint64_t>(bytes.size()));
  const std::byte* p = bytes.data();
  size_t left = bytes.size();
  for (; left >= 32; left -= 32, p += 32)
    for (int i = 0; i < 4; ++i) lanes_[i] = absorb(lanes_[i], load_word(p + 8 * i));
  std::byte tail[32] = {};
  if (left > 0) std::memcpy(tail, p, left);
  for (int i = 0; i < 4; ++i) lanes_[i] = absorb(lanes_[i], load_word(tail + 8 * i));
  return *this;
}

Fingerprint& Fingerprint::add(uint64_t value) {
  lanes_[0] = absorb(lanes_[0], value);
  lanes_[1] = absorb(lanes_[1], ~value);
  return *this;
}

Fingerprint& Fingerprint::add_in_blocks(Bytes bytes) {
  constexpr size_t block = size_t{1} << 20;
  std::vector<std::array<uint64_t, 2>> digests((bytes.size() + block - 1) / block);
  parallel_for(static_cast<int64_t>(digests.size()), 1, [&](int64_t first, int64_t last) {
    for (auto i = static_cast<size_t>(first); i < static_cast<size_t>(last); ++i) {
      const Bytes rest = bytes.subspan(i * block);
      digests[i] = Fingerprint().add(rest.first(std::min(rest.size(), block))).digest();
    }
  });
  return add(static_cast<uint64_t>(bytes.size())).add(std::as_bytes(std::span(digests)));
}

std::array<uint64_t, 2> Fingerprint::digest() const {
  return {finish(lanes_[3] ^ finish(lanes_[0] + finish(lanes_[1] + finish(lanes_[2])))),
          finish(lanes_[0] ^ finish(lanes_[1] ^ finish(lanes_[2] ^ finish(lanes_[3]))))};
}

std::string Fingerprint::hex() const {
  const auto [high, low] = digest();
  return fmt::format("{:016x}{:016x}", high, low);
}

std::string file_fingerprint(const std::string& path) {
  return Fingerprint().add(MappedFile(path).bytes()).hex();
}

}  // namespace qlab
