// Processes of one host that train a run together, each with the whole model on a GPU of its own.
// Rank 0 is the process that a user started; a socket leads from it to each of the others. Small
// things (decisions, losses) go through the sockets, and on a CPU gradients too; between GPUs these
// go by NCCL. Every call is made by all ranks, in the same order.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace qlab {

namespace cuda {

/// "" where NCCL can be had; otherwise what is missing, and what to do.
std::string why_no_nccl();

/// NCCL's communicator of the current device; what it takes of the device's memory is no part of
/// the allocator's account.
class Communicator {
 public:
  /// Which rank 0 makes and all are given.
  static std::string new_id();
  /// Waits for all ranks.
  Communicator(const std::string& id, int rank, int size);
  /// Ends what is under way, so that nothing waits for a rank that is gone.
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  /// all [size, count] = own [count] of every rank, in the order of the device's stream.
  void gather(float* all, const float* own, size_t count) const;

 private:
  void* handle_ = nullptr;
};

}  // namespace cuda

/// On the other ranks: rank 0 has ended, and so do they.
class RankZeroGone : public Error {
 public:
  using Error::Error;
};

class Replicas {
 public:
  /// `sockets`, which are closed at the end: of rank 0 one to each other rank, in their order; of
  /// another rank the one to rank 0. `why_gone` tells rank 0 how a rank ended whose socket has
  /// closed.
  Replicas(int rank, int size, std::vector<int> sockets,
           std::function<std::string(int rank)> why_gone = {});
  ~Replicas();
  Replicas(const Replicas&) = delete;
  Replicas& operator=(const Replicas&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool leads() const { return rank_ == 0; }

  /// Rank 0's text, on all; that of the others does not matter. Does not wait for them.
  std::string tell(const std::string& text);
  /// The value of each rank.
  std::vector<double> gather(double value);
  /// Prepares the gathering of tensors on the device. Error where the ranks' devices are of
  /// different kinds, whose bits may differ.
  void connect(Device device);
  /// all [size n] = own [n] of every rank, fp32, contiguous, on the device of connect(). Returns
  /// when that is done.
  void gather(const Tensor& all, const Tensor& own);
  /// Whether this rank waits for others on a GPU just now, where it cannot see that one has ended.
  /// Any thread may ask.
  bool waits_on_device() const { return waits_; }
  /// Of another rank that cannot go on: rank 0's next call throws this text, with the rank.
  void report(const std::string& error) noexcept;

 private:
  enum class Kind : uint64_t { data, error };
  struct Head {
    Kind kind;
    uint64_t bytes;
  };
  void gather_bytes(void* all, const void* own, size_t bytes);
  void send(int peer, Kind kind, const void* data, size_t bytes);
  void send_all(int peer, const void* data, size_t bytes);
  Head receive_head(int peer);
  void receive(int peer, void* data, size_t bytes);
  void receive_all(int peer, void* data, size_t bytes);
  /// Of rank 0: throws what a rank that has ended reported, or how it ended.
  [[noreturn]] void throw_gone(int peer);
  int socket_to(int peer) const;

  int rank_, size_;
  std::vector<int> sockets_;
  std::function<std::string(int)> why_gone_;
  std::unique_ptr<cuda::Communicator> communicator_;
  std::atomic<bool> waits_ = false;
};

}  // namespace qlab
