// Look-up of torch's current CUDA stream, CUDA error codes as exceptions, and the limit of the instruction-set level.

#include "glue.h"

#ifdef CAPT_WITH_CUDA

#include <dlfcn.h>

namespace capt {

void* current_stream(int32_t device) {
  // The symbol lives in libtorch_cuda.so, which a CPU build of torch does not have: no link-time reference to it.
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "capt: this torch has no CUDA support, so a CUDA tensor cannot be processed");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "capt: torch could not name the current CUDA stream");
  return stream;
}

void check_cuda(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": the CUDA launch failed with cudaError ", error,
                  error == 35 ? " (the driver is older than the CUDA runtime the library was built with)"
                  : error == 209 || error == 222
                      ? " (the library holds no code for this GPU: rebuild with CAPT_CUDA_ARCHS set)"
                      : "");
}

}  // namespace capt

#endif

namespace capt {
namespace {

int64_t limit_cpu_level(int64_t level) { return capt_limit_cpu_level(static_cast<int>(level)); }

}  // namespace
}  // namespace capt

STABLE_TORCH_LIBRARY_FRAGMENT(capt, library) { library.def("limit_cpu_level(int level) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(capt, CompositeExplicitAutograd, library) {
  library.impl("limit_cpu_level", TORCH_BOX(&capt::limit_cpu_level));
}
