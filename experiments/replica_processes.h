// The processes of a run with replicas: the program starts itself once more for each further GPU.
// The others own nothing: they write no file and print nothing, Ctrl-C does not concern them, and
// they end with rank 0, however that ends.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "core/replicas.h"

namespace qlab {

class ReplicaProcesses {
 public:
  /// Starts size - 1 copies of this program with its own arguments. They find in their environment
  /// who they are.
  explicit ReplicaProcesses(int size);
  /// Ends them, whatever they do.
  ~ReplicaProcesses();
  ReplicaProcesses(const ReplicaProcesses&) = delete;
  ReplicaProcesses& operator=(const ReplicaProcesses&) = delete;
  Replicas& replicas() { return *replicas_; }

 private:
  /// Where one has ended and rank 0 waits for it on the GPU, which would be for ever, ends this
  /// process with code 2. Anywhere else rank 0 sees it by itself.
  void watch(int rank);
  void end();
  std::string how_it_ended(int rank) const;

  int size_;
  std::vector<pid_t> processes_;  // of the ranks from 1 on
  std::unique_ptr<Replicas> replicas_;
  std::atomic<bool> ending_ = false;
  std::vector<std::thread> watchers_;
};

/// In a process that ReplicaProcesses has started; otherwise nothing.
std::unique_ptr<Replicas> join_replicas();

}  // namespace qlab
