// pyargs._C: what was built, and what this CPU can do. Loading it also registers the ops (torch must be imported
// first).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "glance.h"
#include "include/pyargs/kernels.h"
#include "include/pyargs/threads.h"
#include "kernels/cpu/capability.h"
#include "stack/bindings.h"
#include "torch_threads.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace pyargs;
  m.doc() = "pyargs extension: build info and the CPU capability of the ops in torch.ops.pyargs";
  if (const char* wanted = std::getenv("PYARGS_CPU_CAPABILITY"); wanted && *wanted) {
    try {
      set_cpu_capability(wanted);
    } catch (const std::invalid_argument&) {
      // The ops are registered by now, so that the loading must not fail: pyargs.ops asks again, and raises.
    }
  }
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = PYARGS_TORCH_VERSION;
        info["compiler"] = __VERSION__;
#ifdef PYARGS_CUDA_ARCHS
        info["cuda_archs"] = std::string(PYARGS_CUDA_ARCHS);
#else
        info["cuda_archs"] = py::none();
#endif
        return info;
      },
      "torch built against, C++ compiler, and the CUDA architectures compiled in (None: CPU only).");
  m.def(
      "cpu_capability_detected", [] { return name_of(best_capability()); },
      "Best capability of this CPU: default, avx2, avx512, avx512_vnni or avx512_bf16.");
  m.def("cpu_capability", &cpu_capability_name, "The capability in use.");
  m.def(
      "set_cpu_capability", [](const std::string& name) { set_cpu_capability(name.c_str()); }, py::arg("name"),
      "Use this capability. For tests; PYARGS_CPU_CAPABILITY does the same at import. Raises ValueError for another "
      "name, and for one that this CPU lacks.");
  m.def("limit_threads", &limit_threads, py::arg("threads"), "At most so many threads work, however many torch has.");
  m.def("thread_count", &thread_count, "How many threads a pass has.");
  m.def("glance", &glance, py::arg("dicts"), py::arg("own"), py::arg("names"),
        "A number made of which objects all values of `dicts` are, and those under `names` in the dicts `own`.");
  stack::bind(m);
}
