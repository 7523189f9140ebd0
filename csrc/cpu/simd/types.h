// What the vectors of all instruction sets share.
#pragma once

#include <cstdint>
#include <cstring>

#define CASVIT_INLINE static inline __attribute__((always_inline))

namespace casvit {
namespace CASVIT_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace CASVIT_ISA
}  // namespace casvit
