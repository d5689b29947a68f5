#include "experiments/replica_processes.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

namespace qlab {
namespace {

constexpr const char* variable = "QLAB_REPLICA";  // rank/size/socket

std::vector<std::string> own_arguments() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> arguments;
  for (std::string word; std::getline(file, word, '\0');) arguments.push_back(word);
  return arguments;
}

/// The descriptor, or a new one in place of it where a program that was started with closed streams
/// would take it for one of these: what it prints would go to another rank. -1 where there is none.
int beyond_streams(int descriptor) {
  if (descriptor > STDERR_FILENO) return descriptor;
  const int moved = fcntl(descriptor, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  const int error = errno;
  close(descriptor);
  errno = error;
  return moved;
}

/// Only what is safe between fork and exec. The signals stay ignored in the new program.
[[noreturn]] void become(char** arguments, int socket, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(0);
  std::signal(SIGINT, SIG_IGN);
  std::signal(SIGTERM, SIG_IGN);
  fcntl(socket, F_SETFD, 0);
  execv("/proc/self/exe", arguments);
  _exit(127);
}

}  // namespace

ReplicaProcesses::ReplicaProcesses(int size) : size_(size) {
  std::vector<std::string> words = own_arguments();
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  const pid_t self = getpid();
  std::vector<int> sockets;
  int error = 0;
  for (int rank = 1; rank < size && error == 0; ++rank) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
      error = errno;
      break;
    }
    for (int& end : pair) {
      end = beyond_streams(end);
      if (end < 0) error = errno;
    }
    sockets.push_back(pair[0]);
    if (error != 0) {
      close(pair[1]);
      break;
    }
    setenv(variable, fmt::format("{}/{}/{}", rank, size, pair[1]).c_str(), 1);
    const pid_t pid = fork();
    if (pid == 0) become(arguments.data(), pair[1], self);
    if (pid < 0) error = errno;
    if (pid > 0) processes_.push_back(pid);
    close(pair[1]);
  }
  unsetenv(variable);
  sockets.resize(static_cast<size_t>(size) - 1, -1);
  replicas_ = std::make_unique<Replicas>(0, size, std::move(sockets), [this](int rank) {
    return how_it_ended(rank) + "; the same command continues from the last saved state";
  });
  for (int rank = 1; rank <= std::ssize(processes_); ++rank)
    watchers_.emplace_back([this, rank] { watch(rank); });
  if (error == 0) return;
  end();
  fail("replica {} of {} cannot be started: {}", processes_.size() + 1, size, std::strerror(error));
}

void ReplicaProcesses::end() {
  ending_ = true;
  for (const pid_t pid : processes_) kill(pid, SIGKILL);
  for (std::thread& watcher : watchers_) watcher.join();
  for (const pid_t pid : processes_) waitpid(pid, nullptr, 0);
  watchers_.clear(), processes_.clear();
}

ReplicaProcesses::~ReplicaProcesses() { end(); }

std::string ReplicaProcesses::how_it_ended(int rank) const {
  siginfo_t info{};
  const auto pid = static_cast<id_t>(processes_[static_cast<size_t>(rank - 1)]);
  while (waitid(P_PID, pid, &info, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
  }
  if (info.si_code == CLD_EXITED) return fmt::format("has ended with code {}", info.si_status);
  return fmt::format("was ended by signal {} ({})", info.si_status, strsignal(info.si_status));
}

void ReplicaProcesses::watch(int rank) {
  const std::string how = how_it_ended(rank);
  constexpr std::chrono::milliseconds patience(10000), look(100);
  for (auto waited = look; waited <= patience; waited += look) {
    if (ending_) return;
    if (!replicas_->waits_on_device()) waited = look;
    std::this_thread::sleep_for(look);
  }
  std::fprintf(stderr,
               "qlab: replica %d of %d %s, and the others wait for it; the same command continues "
               "from the last saved state\n",
               rank, size_, how.c_str());
  _exit(2);
}

std::unique_ptr<Replicas> join_replicas() {
  const char* const value = std::getenv(variable);
  if (value == nullptr) return nullptr;
  const std::string text = value;
  unsetenv(variable);
  int rank = 0, size = 0, socket = -1;
  struct stat status {};
  if (std::sscanf(text.c_str(), "%d/%d/%d", &rank, &size, &socket) != 3 ||
      fstat(socket, &status) != 0 || !S_ISSOCK(status.st_mode))
    fail("{}={} is in the environment, which qlab sets for the replicas that it starts: unset it",
         variable, text);
  fcntl(socket, F_SETFD, FD_CLOEXEC);
  return std::make_unique<Replicas>(rank, size, std::vector<int>{socket});
}

}  // namespace qlab
