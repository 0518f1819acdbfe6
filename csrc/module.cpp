// pyargs._C: what was built, and what this CPU can do. Loading it also registers the ops (torch must be imported
// first).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "glance.h"
#include "kernels/cpu/capability.h"
#include "stack/bindings.h"

namespace py = pybind11;

namespace pyargs {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

Capability detect() {
#ifdef PYARGS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kDefault;
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
  if (!__builtin_cpu_supports("f16c")) return Capability::kDefault;
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;
    return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512Vnni;
  }
  return Capability::kAvx2;
#else
  return Capability::kDefault;
#endif
}

Capability parse(const std::string& name) {
  for (int level = 0; level < 5; ++level) {
    if (name == kNames[level]) return static_cast<Capability>(level);
  }
  throw std::invalid_argument("CPU capability must be default, avx2, avx512, avx512_vnni or avx512_bf16, got '" + name +
                              "'");
}

Capability available(const std::string& name) {
  const Capability wanted = parse(name), best = detect();
  if (wanted <= best) return wanted;
  throw std::invalid_argument("this CPU has no " + name + ", at most " + kNames[static_cast<int>(best)]);
}

std::atomic<Capability> used{detect()};

}  // namespace

Capability cpu_capability() { return used.load(std::memory_order_relaxed); }

}  // namespace pyargs

PYBIND11_MODULE(_C, m) {
  using namespace pyargs;
  m.doc() = "pyargs extension: build info and the CPU capability of the ops in torch.ops.pyargs";
  if (const char* wanted = std::getenv("PYARGS_CPU_CAPABILITY"); wanted && *wanted) {
    try {
      used = available(wanted);
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
      "cpu_capability_detected", [] { return kNames[static_cast<int>(detect())]; },
      "Best capability of this CPU: default, avx2, avx512, avx512_vnni or avx512_bf16.");
  m.def("cpu_capability", [] { return kNames[static_cast<int>(cpu_capability())]; }, "The capability in use.");
  m.def(
      "set_cpu_capability", [](const std::string& name) { used = available(name); }, py::arg("name"),
      "Use this capability. For tests; PYARGS_CPU_CAPABILITY does the same at import. Raises ValueError for another "
      "name, and for one that this CPU lacks.");
  m.def("glance", &glance, py::arg("dicts"), py::arg("own"), py::arg("names"),
        "A number made of which objects all values of `dicts` are, and those under `names` in the dicts `own`.");
  stack::bind(m);
}
