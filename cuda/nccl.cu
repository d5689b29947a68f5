// NCCL, loaded when the first run with replicas begins: most have one GPU, and the library need not
// be there. Its declarations come from nccl.h, which CMake looks for; without it nothing is built
// of this but the refusal.
#include "core/replicas.h"
#include "cuda/launch.cuh"

#if defined(QLAB_WITH_NCCL)
#include <dlfcn.h>
#include <nccl.h>
#endif

namespace qlab::cuda {

#if defined(QLAB_WITH_NCCL)
namespace {

constexpr const char* library_file = "libnccl.so.2";

/// nullptr where it cannot be loaded; then dlerror() says why.
void* library() {
  static void* const handle = dlopen(library_file, RTLD_NOW | RTLD_LOCAL);
  return handle;
}

template <class Function>
Function* function(const char* name) {
  if (const std::string why = why_no_nccl(); !why.empty()) throw Error(why);
  void* const address = dlsym(library(), name);
  if (address == nullptr) fail("{} has no function {}: {}", library_file, name, dlerror());
  return reinterpret_cast<Function*>(address);
}

#define QLAB_NCCL(name)                                                                 \
  [](auto... arguments) {                                                               \
    static auto* const loaded = qlab::cuda::function<decltype(name)>(#name);            \
    const ncclResult_t result = loaded(arguments...);                                   \
    if (result != ncclSuccess)                                                          \
      fail("NCCL: {} failed: {}; NCCL_DEBUG=WARN in the environment tells more", #name, \
           function<decltype(ncclGetErrorString)>("ncclGetErrorString")(result));       \
  }

}  // namespace

std::string why_no_nccl() {
  static const std::string why = [] {
    if (library() != nullptr) return std::string();
    const char* const error = dlerror();
    return fmt::format(
        "replicas on GPUs need NCCL, and {} cannot be loaded: {}. Install NVIDIA's package "
        "libnccl2 "
        "(or the wheel nvidia-nccl-cu{}, and let LD_LIBRARY_PATH name its folder)",
        library_file, error != nullptr ? error : "it is not there", CUDART_VERSION / 1000);
  }();
  return why;
}

std::string Communicator::new_id() {
  ncclUniqueId id;
  QLAB_NCCL(ncclGetUniqueId)(&id);
  return {id.internal, sizeof id.internal};
}

Communicator::Communicator(const std::string& id, int rank, int size) {
  ncclUniqueId own;
  QLAB_CHECK(id.size() == sizeof own.internal, "an NCCL id of {} bytes", id.size());
  id.copy(own.internal, sizeof own.internal);
  ncclComm_t communicator = nullptr;
  QLAB_NCCL(ncclCommInitRank)(&communicator, size, own, rank);
  handle_ = communicator;
}

Communicator::~Communicator() {
  function<decltype(ncclCommAbort)>("ncclCommAbort")(static_cast<ncclComm_t>(handle_));
}

void Communicator::gather(float* all, const float* own, size_t count) const {
  QLAB_NCCL(ncclAllGather)
  (own, all, count, ncclFloat, static_cast<ncclComm_t>(handle_), current_stream());
}

#else  // without NCCL's header

std::string why_no_nccl() {
  return "replicas on GPUs need NCCL, whose header nccl.h was not there when this qlab was built: "
         "install NVIDIA's package libnccl-dev, remove the build folder and run `make` again";
}
std::string Communicator::new_id() { throw Error(why_no_nccl()); }
Communicator::Communicator(const std::string&, int, int) { throw Error(why_no_nccl()); }
Communicator::~Communicator() = default;
void Communicator::gather(float*, const float*, size_t) const { throw Error(why_no_nccl()); }

#endif

}  // namespace qlab::cuda
