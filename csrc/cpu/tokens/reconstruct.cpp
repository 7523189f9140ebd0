#include "cpu/tokens/reconstruct.h"

#include "cpu/scratch.h"

namespace casvit {
namespace {
thread_local Buffer temp_buffer;
}

void reconstruct_tokens(const Kernels& k, const Reconstruction& r, const void* y,
                        const float* distances, int64_t images, int64_t tokens, void* out,
                        const ThreadPool& given) {
  ThreadPool pool = given;
  if (in_forked_child() || images * tokens * r.cells < 16384) pool.threads = 1;
  const int64_t bytes = r.dtype == DType::F32 ? 4 : 2, run = 16;  // tokens of a task
  const int64_t runs = divide_up(tokens, run);
  parallel_for(pool, images * runs, [&](int64_t i) {
    const int64_t image = i / runs, begin = i % runs * run;
    const int64_t end = begin + run < tokens ? begin + run : tokens;
    k.tokens.reconstruct(r, static_cast<const char*>(y) + image * r.cells * r.channels * bytes,
                         distances + image * tokens * r.cells, begin, end,
                         static_cast<char*>(out) + image * tokens * r.channels * bytes,
                         temp_buffer.get(reconstruction_temp_bytes(r)));
  });
}

}  // namespace casvit
