// Memory of the host from which, and to which, a GPU copies.
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "core/device.h"
#include "core/host_pages.h"
#include "core/parallel.h"
#include "cuda/launch.cuh"

namespace qlab::cuda {
namespace {

// Below, a call of cudaHostAlloc takes no time that is noticed.
constexpr size_t pinned_by_parts = size_t{32} << 20;

/// Blocks of the heap that were page-locked afterwards.
struct LockedBlocks {
  std::mutex mutex;
  std::map<void*, std::unique_ptr<void, decltype(&std::free)>> blocks;
};
LockedBlocks& locked_blocks() {
  static LockedBlocks& blocks = *new LockedBlocks;  // used until the process ends
  return blocks;
}

void* allocate_by_driver(size_t bytes) {
  void* pointer = nullptr;
  const cudaError_t status = cudaHostAlloc(&pointer, bytes == 0 ? 1 : bytes, cudaHostAllocDefault);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(status, "cudaHostAlloc");
  return pointer;
}

/// What is copied from pageable memory goes through these, filled by all threads.
class Staging {
 public:
  void upload(char* destination, const char* source, size_t bytes) {
    const std::lock_guard lock(mutex_);
    for (size_t at = 0; at < bytes; at += part_bytes, next_ = (next_ + 1) % parts_.size()) {
      Part& part = parts_[next_];
      if (part.memory == nullptr) {
        part.memory = static_cast<char*>(allocate_by_driver(part_bytes));
        if (part.memory == nullptr) return copy_async(destination + at, source + at, bytes - at);
        check(cudaEventCreateWithFlags(&part.read, cudaEventDisableTiming), "cudaEventCreate");
      }
      check(cudaEventSynchronize(part.read), "cudaEventSynchronize");
      const size_t own = std::min(part_bytes, bytes - at);
      parallel_for(static_cast<int64_t>(own), 256 << 10, [&](int64_t begin, int64_t end) {
        std::memcpy(part.memory + begin, source + at + begin, static_cast<size_t>(end - begin));
      });
      copy_async(destination + at, part.memory, own);
      check(cudaEventRecord(part.read, current_stream()), "cudaEventRecord");
    }
  }
  static constexpr size_t part_bytes = size_t{8} << 20;

 private:
  struct Part {
    char* memory = nullptr;
    cudaEvent_t read = nullptr;
  };
  std::mutex mutex_;
  std::array<Part, 4> parts_;
  size_t next_ = 0;
};

Staging& staging(int device) {
  constexpr int max_devices = 64;
  static auto& all = *new std::array<Staging, max_devices>;  // used until the process ends
  return all.at(static_cast<size_t>(device));
}

bool is_pageable(const void* pointer) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, pointer), "cudaPointerGetAttributes");
  return attributes.type == cudaMemoryTypeUnregistered;
}

}  // namespace

// The driver clears pages one by one, about 1 GB a second; all threads of the host do it sooner,
// and page-locking what is there already takes less.
void* allocate_pinned(size_t bytes) {
  if (bytes < pinned_by_parts) return allocate_by_driver(bytes);
  std::unique_ptr<void, decltype(&std::free)> block(allocate_pages(bytes), &std::free);
  if (block == nullptr) return nullptr;
  touch_pages(block.get(), bytes);
  void* const pointer = block.get();
  if (cudaHostRegister(pointer, bytes, cudaHostRegisterDefault) != cudaSuccess) {
    cudaGetLastError();
    block.reset();
    return allocate_by_driver(bytes);
  }
  LockedBlocks& locked = locked_blocks();
  const std::lock_guard lock(locked.mutex);
  locked.blocks.emplace(pointer, std::move(block));
  return pointer;
}

// Runs in destructors, also while the process ends: a status has nowhere to go.
void release_pinned(void* pointer) {
  LockedBlocks& locked = locked_blocks();
  const std::lock_guard lock(locked.mutex);
  const auto found = locked.blocks.find(pointer);
  if (found == locked.blocks.end()) {
    cudaFreeHost(pointer);
    return;
  }
  cudaHostUnregister(pointer);
  locked.blocks.erase(found);
}

void upload(void* destination, const void* source, size_t bytes) {
  if (bytes < Staging::part_bytes / 2 || !is_pageable(source))
    return copy_async(destination, source, bytes);
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  staging(device).upload(static_cast<char*>(destination), static_cast<const char*>(source), bytes);
}

}  // namespace qlab::cuda
