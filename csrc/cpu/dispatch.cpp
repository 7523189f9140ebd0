#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace casvit {
namespace {

struct Isa {
  const char* name;
  const Kernels& (*kernels)();  // null: not in this build
  std::string (*why_not)();     // empty: usable
};

std::string always() { return ""; }

#if defined(__x86_64__)
std::string without(const char* feature) {
  return std::string("this CPU does not have ") + feature;
}
std::string why_not_avx2() {
  if (!__builtin_cpu_supports("avx2")) return without("AVX2");
  if (!__builtin_cpu_supports("fma")) return without("FMA");
  unsigned a, b, c, d;  // F16C: leaf 1, ecx bit 29; older compilers have no name for it
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 29))) return without("F16C");
  return "";
}
std::string why_not_avx512() {
  std::string reason = why_not_avx2();
  if (!reason.empty()) return reason;
  if (!__builtin_cpu_supports("avx512f")) return without("AVX512F");
  if (!__builtin_cpu_supports("avx512bw")) return without("AVX512BW");
  if (!__builtin_cpu_supports("avx512vl")) return without("AVX512VL");
  if (!__builtin_cpu_supports("avx512dq")) return without("AVX512DQ");
  return "";
}
std::string why_not_avx512_bf16() {
  std::string reason = why_not_avx512();
  if (!reason.empty()) return reason;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return without("AVX512_BF16");
  return "";
}
std::string why_not_amx() {
  std::string reason = why_not_avx512_bf16();
  if (!reason.empty()) return reason;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24)))
    return without("AMX-BF16");
  if (!(d & (1u << 25))) return without("AMX-INT8");
#if defined(__linux__)
  // The kernel hands out the tile registers on request, once per process.
  const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted ? "" : "the operating system does not grant the AMX registers";
#else
  return "AMX is used on Linux only";
#endif
}
#endif

// The build defines CASVIT_HAVE_<SET> for each one that the compiler could build.
const Isa ISAS[] = {
#if defined(__x86_64__)
#if defined(CASVIT_HAVE_AMX)
    {"amx", amx_kernels, why_not_amx},
#else
    {"amx", nullptr, why_not_amx},
#endif
#if defined(CASVIT_HAVE_AVX512_BF16)
    {"avx512_bf16", avx512_bf16_kernels, why_not_avx512_bf16},
#else
    {"avx512_bf16", nullptr, why_not_avx512_bf16},
#endif
#if defined(CASVIT_HAVE_AVX512)
    {"avx512", avx512_kernels, why_not_avx512},
#else
    {"avx512", nullptr, why_not_avx512},
#endif
#if defined(CASVIT_HAVE_AVX2)
    {"avx2", avx2_kernels, why_not_avx2},
#else
    {"avx2", nullptr, why_not_avx2},
#endif
#endif
    {"portable", portable_kernels, always},
};

const Isa* find(const char* name) {
  for (const Isa& isa : ISAS)
    if (std::strcmp(isa.name, name) == 0) return &isa;
  return nullptr;
}

std::string names(const char* separator) {
  std::string all;
  for (const Isa& isa : ISAS) all += std::string(all.empty() ? "" : separator) + isa.name;
  return all;
}

std::string why_not(const Isa& isa) {
  return isa.kernels ? isa.why_not() : "not in this build: the compiler was too old for it";
}
std::string why_not(const char* name) {
  const Isa* isa = find(name);
  return isa ? why_not(*isa) : "this version knows " + names(", ");
}

std::atomic<const Kernels*> active{nullptr};

const Kernels& best() {
  for (const Isa& isa : ISAS)
    if (why_not(isa).empty()) return isa.kernels();
  return portable_kernels();
}

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (!kernels) active.store(kernels = &best(), std::memory_order_release);
  return *kernels;
}

}  // namespace casvit

// Plain C functions, called from Python through ctypes.
#define CASVIT_EXPORT __attribute__((visibility("default")))
extern "C" {

CASVIT_EXPORT const char* casvit_cpu_isa_active() { return casvit::active_kernels().name; }

// Comma-separated, best first; also those that could not be built.
CASVIT_EXPORT const char* casvit_cpu_isa_known() {
  static const std::string known = casvit::names(",");
  return known.c_str();
}

// Why this instruction set cannot be used here; empty when it can.
CASVIT_EXPORT const char* casvit_cpu_isa_reason(const char* name) {
  static thread_local std::string reason;
  reason = casvit::why_not(name);
  return reason.c_str();
}

// Use this instruction set from now on; returns why not, or empty.
CASVIT_EXPORT const char* casvit_cpu_isa_select(const char* name) {
  const char* reason = casvit_cpu_isa_reason(name);
  if (!*reason) casvit::active.store(&casvit::find(name)->kernels());
  return reason;
}
}
