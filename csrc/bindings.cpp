// The Python module collm_fast._C: what was built, and host helpers that are not tensor operators.
//
// Each csrc/host/<file>.cpp defines one bind_<file>; each helper has a NumPy twin in Python, its oracle and what runs
// where nothing was compiled. Tensor operators live in csrc/cpu and csrc/cuda: this module knows nothing of torch.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

void bind_graph(py::module_& m);
void bind_planner(py::module_& m);
void bind_ranking(py::module_& m);
void bind_sampler(py::module_& m);

namespace {

std::string simd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? "avx512_bf16" : "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return "avx2";
  }
#endif
  return "scalar";
}

py::dict build_info() {
  py::dict info;
  info["version"] = COLLM_FAST_VERSION;
  info["torch"] = COLLM_FAST_TORCH_VERSION;
  info["cuda"] = COLLM_FAST_CUDA_VERSION[0] ? py::object(py::str(COLLM_FAST_CUDA_VERSION)) : py::object(py::none());
  info["compiler"] = __VERSION__;
  info["simd"] = simd();
  info["tiles"] = collm::has_tiles();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "collm_fast's host helpers; see the Python functions that call them.";
  m.def("build_info", &build_info,
        "The version, torch, CUDA and compiler of this build, and this CPU's instruction set; whether bfloat16 "
        "products may use AMX tiles.");
  bind_graph(m);
  bind_planner(m);
  bind_ranking(m);
  bind_sampler(m);
}
