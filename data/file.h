// Files: read-only mappings, whole-file reads, atomic replacement, and content fingerprints.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace qlab {

using Bytes = std::span<const std::byte>;

/// A file mapped read-only. Copies share the mapping, which goes with the last of them.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  Bytes bytes() const { return bytes_; }
  size_t size() const { return bytes_.size(); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::shared_ptr<void> mapping_;
  Bytes bytes_;
};

std::string read_text_file(const std::string& path);

/// A file under construction. Written beside `path`, flushed to disk and renamed over it by
/// commit(); destroyed before that, it leaves nothing behind and `path` as it was.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(Bytes bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  void commit();

 private:
  [[noreturn]] void fail_with_reason(const char* action);
  std::string path_, temporary_;
  int descriptor_ = -1;
};

/// Held by one process at a time, until it goes out of scope or the process ends.
class FileLock {
 public:
  /// nullopt when another holds it and `wait` is false. Makes the file.
  static std::optional<FileLock> take(const std::string& path, bool wait);
  /// True where it cannot be asked, too; not without the file, which is only read.
  static bool held(const std::string& path);
  FileLock(FileLock&& other) noexcept;
  FileLock& operator=(FileLock&&) = delete;
  ~FileLock();

 private:
  explicit FileLock(int descriptor) : descriptor_(descriptor) {}
  int descriptor_;
};

/// What processes that were killed left of their AtomicFiles in a folder where nobody writes now.
void remove_temporary_files(const std::string& folder);

/// What has been appended to a file survives a power cut.
void flush_to_disk(const std::string& path);

/// "; free some space ..." where that helps against this errno, or "".
const char* disk_remedy(int error);

/// All of `bytes` or the old content, never a part.
void write_file_atomically(const std::string& path, Bytes bytes);
void write_file_atomically(const std::string& path, std::string_view text);

/// A 128-bit digest for telling contents apart: fast, not cryptographic. Each input word passes
/// through a bijection of the state, so that one changed word always changes the state.
class Fingerprint {
 public:
  Fingerprint& add(Bytes bytes);  // the length is part of the digest, so pieces do not run together
  Fingerprint& add(std::string_view text) { return add(std::as_bytes(std::span(text))); }
  Fingerprint& add(uint64_t value);
  /// For contents of many GB: the digests of blocks of 1 MiB, which threads make side by side.
  Fingerprint& add_in_blocks(Bytes bytes);
  std::string hex() const;  // 32 digits

 private:
  std::array<uint64_t, 2> digest() const;

  uint64_t lanes_[4] = {0x243f6a8885a308d3, 0x13198a2e03707344, 0xa4093822299f31d0,
                        0x082efa98ec4e6c89};  // digits of pi
};

/// Fingerprint of the whole content.
std::string file_fingerprint(const std::string& path);

}  // namespace qlab
