// Which code a CPU runs. Baseline only.
#include "capability.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "../../include/pyargs/kernels.h"

namespace pyargs {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

Capability detect() {
#if PYARGS_BEST >= 1
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kDefault;
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
  if (!__builtin_cpu_supports("f16c")) return Capability::kDefault;
#endif
#if PYARGS_BEST >= 2
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (PYARGS_BEST < 3 || !__builtin_cpu_supports("avx512vnni")) return Capability::kAvx512;
    if (PYARGS_BEST < 4 || !__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Vnni;
    return Capability::kAvx512Bf16;
  }
#endif
  return Capability::kAvx2;
#else
  return Capability::kDefault;
#endif
}

std::atomic<Capability> used{detect()};

}  // namespace

Capability cpu_capability() { return used.load(std::memory_order_relaxed); }

Capability best_capability() { return detect(); }

const char* name_of(Capability capability) { return kNames[static_cast<int>(capability)]; }

const char* cpu_capability_name() { return name_of(cpu_capability()); }

void set_cpu_capability(const char* name) {
  for (int level = 0; level < 5; ++level) {
    if (std::string(name) != kNames[level]) continue;
    const auto wanted = static_cast<Capability>(level);
    if (wanted <= detect()) {
      used = wanted;
      return;
    }
    throw std::invalid_argument(std::string(level > PYARGS_BEST ? "this build has no " : "this CPU has no ") + name +
                                ", at most " + name_of(detect()));
  }
  throw std::invalid_argument("CPU capability must be default, avx2, avx512, avx512_vnni or avx512_bf16, got '" +
                              std::string(name) + "'");
}

}  // namespace pyargs
