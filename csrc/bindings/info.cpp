// What the library says of itself: plain C functions, called from Python through ctypes.
#include "mixer_weights.h"

#define CASVIT_EXPORT __attribute__((visibility("default")))

extern "C" {

// The compiler that made this library.
CASVIT_EXPORT const char* casvit_build_info() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown compiler";
#endif
}

// The names of the weights in the order of the operators' arguments, comma-separated.
CASVIT_EXPORT const char* casvit_mixer_weights() {
#define CASVIT_NAME(prefix, field, ...) "," #prefix #field
  static const char names[] = CASVIT_MIXER_WEIGHTS(CASVIT_NAME);
  return names + 1;  // behind the first comma
}
}
