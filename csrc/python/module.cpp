// capt._C: build facts, and the CPU kernels by pointer and instruction-set level (tests, benchmarks).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "grid_adapter.h"

#ifdef CAPT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

constexpr const char* kLevelNames[CAPT_LEVELS] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

py::dict build_info() {
  py::dict info;
  info["version"] = CAPT_VERSION;
  info["compiler"] = CAPT_COMPILER;
#ifdef CAPT_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_archs"] = CAPT_CUDA_ARCHS;
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = "";
#endif
  info["cpu_level"] = kLevelNames[capt_cpu_level()];
  return info;
}

py::list cpu_levels() {
  py::list names;
  for (int level = 0; level <= capt_cpu_level(); ++level) names.append(kLevelNames[level]);
  return names;
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int status) {
  if (status != 0) throw std::invalid_argument("this CPU does not run that instruction-set level");
}

// Contiguous tensors given by address; sizes = (batch, length, dim, height, width, n_prefix).
using Sizes = std::array<int64_t, 6>;

void grid_adapter(int level, int dtype, uintptr_t tokens, uintptr_t weight, float alpha, uintptr_t out, Sizes sizes,
                  bool transpose) {
  const auto [batch, length, dim, height, width, n_prefix] = sizes;
  const CaptGridAdapter args{pointer<void>(tokens),
                             pointer<float>(weight),
                             nullptr,
                             pointer<void>(out),
                             batch,
                             length,
                             dim,
                             height,
                             width,
                             n_prefix,
                             length * dim,
                             dim,
                             0,
                             alpha,
                             transpose,
                             dtype};
  std::vector<float> packed(static_cast<size_t>(9 * dim));
  capt_grid_adapter_pack(&args, packed.data());
  check(capt_grid_adapter_cpu(&args, packed.data(), level, 0, capt_grid_adapter_tasks(&args)));
}

void grid_correlate(int level, int dtype, uintptr_t tokens, uintptr_t grad, uintptr_t partial, Sizes sizes) {
  const auto [batch, length, dim, height, width, n_prefix] = sizes;
  const CaptGridCorrelate args{pointer<void>(tokens),
                               pointer<void>(grad),
                               pointer<float>(partial),
                               batch,
                               length,
                               dim,
                               height,
                               width,
                               n_prefix,
                               length * dim,
                               dim,
                               length * dim,
                               dim,
                               dtype};
  check(capt_grid_correlate_cpu(&args, level, 0, capt_grid_correlate_tasks(&args)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts and CPU kernels of capt.";
  module.def("build_info", &build_info, "How the native code was built and what this CPU offers.");
  module.def("cpu_levels", &cpu_levels, "Instruction-set levels this CPU runs, lowest first.");
  module.def("grid_adapter", &grid_adapter, py::arg("level"), py::arg("dtype"), py::arg("tokens"), py::arg("weight"),
             py::arg("alpha"), py::arg("out"), py::arg("sizes"), py::arg("transpose"));
  module.def("grid_correlate", &grid_correlate, py::arg("level"), py::arg("dtype"), py::arg("tokens"), py::arg("grad"),
             py::arg("partial"), py::arg("sizes"));
}
