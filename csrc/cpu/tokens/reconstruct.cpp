#include "cpu/tokens/reconstruct.h"

#include "cpu/scratch.h"

namespace casvit {
namespace {

thread_local Buffer temp_buffer;

// f(image, begin, end, temp) for runs of tokens.
template <class F>
void each_run(const Reconstruction& r, int64_t images, int64_t tokens, const ThreadPool& given,
              const F& f) {
  ThreadPool pool = given;
  if (in_forked_child() || images * tokens * r.cells < 16384) pool.threads = 1;
  const int64_t run = 16, runs = divide_up(tokens, run);
  parallel_for(pool, images * runs, [&](int64_t i) {
    const int64_t begin = i % runs * run, end = begin + run < tokens ? begin + run : tokens;
    f(i / runs, begin, end, temp_buffer.get(reconstruction_temp_bytes(r)));
  });
}

}  // namespace

void reconstruct_tokens(const Kernels& k, const Reconstruction& r, const void* y,
                        const float* distances, int64_t images, int64_t tokens, void* out,
                        const ThreadPool& pool) {
  const int64_t bytes = r.channels * (r.dtype == DType::F32 ? 4 : 2);
  each_run(r, images, tokens, pool, [&](int64_t image, int64_t begin, int64_t end, void* temp) {
    k.tokens.reconstruct(r, static_cast<const char*>(y) + image * r.cells * bytes,
                         distances + image * tokens * r.cells, begin, end,
                         static_cast<char*>(out) + image * tokens * bytes, temp);
  });
}

void token_weights(const Kernels& k, const Reconstruction& r, const float* distances,
                   int64_t images, int64_t tokens, float* out, const ThreadPool& pool) {
  each_run(r, images, tokens, pool, [&](int64_t image, int64_t begin, int64_t end, void* temp) {
    const int64_t first = image * tokens * r.cells;
    k.tokens.weights(r, distances + first, begin, end, out + first, temp);
  });
}

}  // namespace casvit
