// The backward phases, written once over Vec and compiled per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixer/gates.h"
#include "cpu/simd/accumulate.h"

namespace casvit {
namespace CASVIT_ISA {

// sums[t] += own pixels times their neighbours at tap t: the gradient of `convolve` at its taps.
// rows[dy] points at the left neighbour of pixel 0.
template <int N>
CASVIT_INLINE void correlate(const float* const (&rows)[3], const Vec (&own)[N], Vec (&sums)[9]) {
#pragma GCC unroll 16
  for (int j = 0; j < N + 2; ++j) {
#pragma GCC unroll 3
    for (int dy = 0; dy < 3; ++dy) {  // the rows' sums do not wait for one another
      const Vec z = in_register(load(rows[dy] + j * VL));
      if (j < N) sums[3 * dy] = fma(z, own[j], sums[3 * dy]);
      if (j >= 1 && j <= N) sums[3 * dy + 1] = fma(z, own[j - 1], sums[3 * dy + 1]);
      if (j >= 2) sums[3 * dy + 2] = fma(z, own[j - 2], sums[3 * dy + 2]);
    }
  }
}

CASVIT_INLINE void clear_row(const Geometry& g, float* row) {
  std::memset(row, 0, sizeof(float) * static_cast<size_t>(g.row));
}

// The first n of VL elements; memory behind them is not touched.
template <class T>
CASVIT_INLINE Vec load_first(const T* p, int n) {
  T lanes[VL] = {};
  std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(n));
  return load_as_float(lanes);
}

// Rows [y_begin, y_end) of a channel block of x as padded rows; zero outside the image. x: the
// block's first channel of the image.
template <class T>
CASVIT_INLINE void read_rows(const T* x, const Input& in, const Geometry& g, int channels,
                             int64_t y_begin, int64_t y_end, float* to) {
  const int64_t first = y_begin < 0 ? 0 : y_begin, last = y_end > g.H ? g.H : y_end;
  for (int64_t y = y_begin; y < y_end; ++y) {
    float* row = to + (y - y_begin) * g.row;
    if (y < first || y >= last) {
      clear_row(g, row);
    } else {
      store(row, zero());
      store(row + (g.W + 1) * VL, zero());
    }
  }
  to += (first - y_begin) * g.row + VL;
  const int64_t pixels = (last - first) * g.W;
  if (in.column_stride == 1 && in.row_stride == g.W && pixels >= VL) {
    const T* from = x + first * g.W;
    int64_t column = 0;
    float* row = to;
    for (int64_t i = 0; i < pixels; i += VL) {
      if (i + VL > pixels) {  // the last group takes in pixels of the one before
        i = pixels - VL;
        row = to + i / g.W * g.row;
        column = i % g.W;
      }
      Vec r[VL];
      for (int j = 0; j < VL; ++j)
        r[j] = j < channels ? load_as_float(from + j * in.channel_stride + i) : zero();
      transpose(r);
      for (int j = 0; j < VL; ++j) {
        store(row + column * VL, r[j]);
        if (++column == g.W) {
          column = 0;
          row += g.row;
        }
      }
    }
    return;
  }
  for (int64_t y = first; y < last; ++y, to += g.row) {
    const T* from = x + y * in.row_stride;
    if (in.channel_stride == 1 && channels == VL) {
      for (int64_t i = 0; i < g.W; ++i)
        store(to + i * VL, load_as_float(from + i * in.column_stride));
    } else if (in.channel_stride == 1) {
      for (int64_t i = 0; i < g.W; ++i)
        store(to + i * VL, load_first(from + i * in.column_stride, channels));
    } else {
      for (int64_t i = 0; i < g.W; ++i)
        for (int j = 0; j < VL; ++j)
          to[i * VL + j] =
              j < channels ? widen_one(from + i * in.column_stride + j * in.channel_stride) : 0.0f;
    }
  }
}
static void read_rows(const Input& in, const Geometry& g, int64_t image, int64_t block,
                      int64_t y_begin, int64_t y_end, float* to) {
  const int64_t channel = block * VL;
  const int channels = static_cast<int>(g.C - channel < VL ? g.C - channel : VL);
  const int64_t offset = image * in.batch_stride + channel * in.channel_stride;
  switch (in.dtype) {
    case DType::F32:
      return read_rows(static_cast<const float*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
    case DType::BF16:
      return read_rows(static_cast<const Bf16*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
    case DType::F16:
      return read_rows(static_cast<const F16*>(in.data) + offset, in, g, channels, y_begin, y_end,
                       to);
  }
}

// With a = q2 + k2, l = dwc(a), u = l v, out = proj(u), and g-names for the gradients at them: from
// grad to gu, gl, gv, ga, the weights' gradients, and what the gates' gradients need of ga.
static void backward_combine(const Geometry& g, const WeightsView& w, const BackwardCombine& io,
                             int64_t image, int64_t block, int64_t y_begin, int64_t y_end,
                             double* totals, float* temp) {
  const int64_t tensor = g.blocks * g.plane, padded = g.padded();
  const float* z[2];
  z[0] = io.planes + image * 3 * tensor + block * g.plane;
  z[1] = z[0] + tensor;
  const float* v = z[1] + tensor;
  const float* s[2];
  s[0] = io.spatial + image * 2 * g.pixels();
  s[1] = s[0] + g.pixels();
  const Vec gate[2] = {load(io.channel + image * padded + block * VL),
                       load(io.channel + (io.images + image) * padded + block * VL)};
  const float* dwc = w.dwc + block * 9 * VL;
  const Vec dwc_bias = load(w.dwc_bias + block * VL);
  const float* proj = w.proj + block * 9 * VL;

  const int64_t stride = 3 * g.C;
  const int channels = static_cast<int>(g.C - block * VL < VL ? g.C - block * VL : VL);
  float* grad_v = io.grad_qkv + image * g.pixels() * stride + 2 * g.C + block * VL;
  float* grad_sum = io.grad_sum + (image * g.blocks + block) * g.pixels() * VL;
  float* pixel_sums = io.pixel + (image * g.blocks + block) * 2 * g.pixels();

  // Rings of three rows, and all rows of grad that the band needs.
  float *sum = temp, *hidden = sum + 3 * g.row;
  float* grad = hidden + 3 * g.row;
  float* products[2];  // ga g z of pixels whose sums over the lanes are still to do
  products[0] = grad + (y_end - y_begin + 4) * g.row;
  products[1] = products[0] + (SUMMED_PIXELS + g.W + VL) * VL;
  std::memset(temp, 0, sizeof(float) * static_cast<size_t>(6 * g.row));
  auto ring = [&](float* base, int64_t y) { return base + (y + 3) % 3 * g.row; };
  auto grad_row = [&](int64_t y) { return grad + (y - y_begin + 2) * g.row; };
  read_rows(*io.grad, g, image, block, y_begin - 2, y_end + 2, grad);
  Sums<COMBINE_SUMS> sums(totals);

  auto make_sum = [&](int64_t y) {
    float* to = ring(sum, y);
    if (y < 0 || y >= g.H) return clear_row(g, to);
    add_gated(z[0] + (y + 1) * g.row + VL, z[1] + (y + 1) * g.row + VL, s[0] + y * g.W,
              s[1] + y * g.W, gate[0], gate[1], g.W, to + VL);
  };
  // gl of a row of the next band or the one before.
  auto make_hidden_around = [&](int64_t y) {
    float* to = ring(hidden, y);
    if (y < 0 || y >= g.H) return clear_row(g, to);
    const float* from_v = v + (y + 1) * g.row + VL;
    const Taps proj_back(proj, true);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec grad_mixed[N];
      for (int i = 0; i < N; ++i) grad_mixed[i] = zero();
      convolve<N>({grad_row(y - 1) + x * VL, grad_row(y) + x * VL, grad_row(y + 1) + x * VL},
                  proj_back, grad_mixed);
      for (int i = 0; i < N; ++i)
        store(to + (x + i + 1) * VL, mul(grad_mixed[i], load(from_v + (x + i) * VL)));
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
  };
  // gl and gv of a row of the band, and its part of the weights' gradients.
  auto make_hidden = [&](int64_t y, int64_t first, int64_t width) {
    const int64_t at = first * VL;
    const float* const sums_from[3] = {ring(sum, y - 1) + at, ring(sum, y) + at,
                                       ring(sum, y + 1) + at};
    const float* const grads_from[3] = {grad_row(y - 1) + at, grad_row(y) + at,
                                        grad_row(y + 1) + at};
    float* to = ring(hidden, y) + at + VL;
    const float* from_v = v + (y + 1) * g.row + at + VL;
    float* to_v = grad_v + (y * g.W + first) * stride;
    const Taps dwc_taps(dwc), proj_back(proj, true);
    Vec taps[9], bias = zero();
    for (int t = 0; t < 9; ++t) taps[t] = zero();
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      const float* const sums_at[3] = {sums_from[0] + x * VL, sums_from[1] + x * VL,
                                       sums_from[2] + x * VL};
      const float* const grads_at[3] = {grads_from[0] + x * VL, grads_from[1] + x * VL,
                                        grads_from[2] + x * VL};
      Vec mixed[N], grad_mixed[N];
      for (int i = 0; i < N; ++i) mixed[i] = dwc_bias;
      convolve<N>(sums_at, dwc_taps, mixed);
      for (int i = 0; i < N; ++i) grad_mixed[i] = zero();
      convolve<N>(grads_at, proj_back, grad_mixed);
      Vec part = zero();
      for (int i = 0; i < N; ++i) {
        const Vec value = load(from_v + (x + i) * VL);
        store_first(to_v + (x + i) * stride, mul(grad_mixed[i], mixed[i]), channels);
        store(to + (x + i) * VL, mul(grad_mixed[i], value));
        mixed[i] = mul(mixed[i], value);
        part = add(part, load(grads_at[1] + (i + 1) * VL));
      }
      bias = add(bias, part);
      correlate<N>(grads_at, mixed, taps);
    };
    CASVIT_FOR_PIXEL_RUNS(width, pixels);
    for (int t = 0; t < 9; ++t) sums.add_to(PROJ + 8 - t, taps[t]);
    sums.add_to(PROJ_BIAS, bias);

    for (int t = 0; t < 9; ++t) taps[t] = zero();
    bias = zero();
    auto weights = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec own[N], part = zero();
      for (int i = 0; i < N; ++i) {
        own[i] = load(to + (x + i) * VL);
        part = add(part, own[i]);
      }
      bias = add(bias, part);
      correlate<N>({sums_from[0] + x * VL, sums_from[1] + x * VL, sums_from[2] + x * VL}, own,
                   taps);
    };
    CASVIT_FOR_PIXEL_RUNS(width, weights);
    sums.add_to(DWC, taps);
    sums.add_to(DWC_BIAS, bias);
  };
  int64_t waiting = 0;
  auto make_grad_sum = [&](int64_t y, int64_t first, int64_t width) {
    const float *q = z[0] + (y + 1) * g.row + (first + 1) * VL,
                *k = z[1] + (y + 1) * g.row + (first + 1) * VL;
    const float *s_q = s[0] + y * g.W + first, *s_k = s[1] + y * g.W + first;
    const float* const from[3] = {ring(hidden, y - 1) + first * VL, ring(hidden, y) + first * VL,
                                  ring(hidden, y + 1) + first * VL};
    float* to = grad_sum + (y * g.W + first) * VL;
    float *to_q = products[0] + waiting * VL, *to_k = products[1] + waiting * VL;
    const Taps dwc_back(dwc, true);
    Vec sum_q = zero(), sum_k = zero();
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i) acc[i] = zero();
      convolve<N>({from[0] + x * VL, from[1] + x * VL, from[2] + x * VL}, dwc_back, acc);
      Vec part_q = zero(), part_k = zero();
      for (int i = 0; i < N; ++i) {
        const int64_t at = (x + i) * VL;
        store(to + at, acc[i]);
        const Vec by_q = mul(acc[i], load(q + at)), by_k = mul(acc[i], load(k + at));
        part_q = fma(by_q, splat(s_q[x + i]), part_q);
        part_k = fma(by_k, splat(s_k[x + i]), part_k);
        store(to_q + at, mul(by_q, gate[0]));
        store(to_k + at, mul(by_k, gate[1]));
      }
      sum_q = add(sum_q, part_q);
      sum_k = add(sum_k, part_k);
    };
    CASVIT_FOR_PIXEL_RUNS(width, pixels);
    sums.add_to(CHANNEL_SUM, sum_q);
    sums.add_to(CHANNEL_SUM + 1, sum_k);
    sums.count(width);

    waiting += width;
    if (waiting < SUMMED_PIXELS && (y + 1 < y_end || first + width < g.W)) return;
    for (int i = 0; i < 2; ++i) {
      float* to_pixels = pixel_sums + i * g.pixels() + y * g.W + first + width - waiting;
      for (int64_t p = 0; p < waiting; p += VL)
        store_first(to_pixels + p, sum_each(products[i] + p * VL),
                    static_cast<int>(waiting - p < VL ? waiting - p : VL));
    }
    waiting = 0;
  };

  auto by_spans = [&](const auto& make, int64_t y) {
    for (int64_t x = 0; x < g.W; x += SPAN) make(y, x, g.W - x < SPAN ? g.W - x : SPAN);
  };
  make_hidden_around(y_begin - 1);
  make_sum(y_begin - 1);
  make_sum(y_begin);
  for (int64_t y = y_begin; y < y_end; ++y) {
    make_sum(y + 1);
    by_spans(make_hidden, y);
    if (y > y_begin) by_spans(make_grad_sum, y - 1);
  }
  make_hidden_around(y_end);
  by_spans(make_grad_sum, y_end - 1);
  sums.flush();
}

// One strip of one gate: the gradient es at the logit of every pixel, the weights' gradient sum es
// r and BatchNorm's sums of gn and gn n^.
static void backward_gate(const Geometry& g, const TrainingGate& w, const float* z, const float* s,
                          const float* pixel, const float* shift, int64_t strip, float* logit,
                          float* sums, float* temp) {
  const Strips strips = make_strips(g);
  const int64_t y0 = strip / strips.across * strips.rows,
                x0 = strip % strips.across * strips.columns;
  const int64_t rows = y0 + strips.rows < g.H ? strips.rows : g.H - y0;
  const int64_t columns = x0 + strips.columns < g.W ? strips.columns : g.W - x0;
  const int64_t pixels = rows * columns;
  float* partial = temp;  // [pixel][lane], with VL spare pixels as everything here
  float* gate = partial + (pixels + VL) * VL;
  float* gradient = gate + pixels + VL;

  for (int64_t block = 0; block < g.blocks; ++block) {
    const Vec weight = load(shift + block * VL);
    for (int64_t y = 0; y < rows; ++y) {
      const float* from = z + block * g.plane + (y0 + y + 1) * g.row + (x0 + 1) * VL;
      float* to = partial + y * columns * VL;
      if (block == 0)
        for (int64_t x = 0; x < columns; ++x) store(to + x * VL, mul(load(from + x * VL), weight));
      else
        for (int64_t x = 0; x < columns; ++x)
          store(to + x * VL, fma(load(from + x * VL), weight, load(to + x * VL)));
    }
  }
  for (int64_t y = 0; y < rows; ++y) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(columns);
    std::memcpy(gate + y * columns, s + (y0 + y) * g.W + x0, bytes);
    std::memcpy(gradient + y * columns, pixel + (y0 + y) * g.W + x0, bytes);
  }
  for (int64_t i = pixels; i < pixels + VL; ++i) {
    store(partial + i * VL, zero());
    gate[i] = gradient[i] = 0.0f;
  }
  for (int64_t i = 0; i < pixels; i += VL) {
    const Vec open = load(gate + i);
    const Vec slope = mul(open, sub(splat(1.0f), open));
    store(gradient + i, mul(add(load(gradient + i), sum_each(partial + i * VL)), slope));
  }
  for (int64_t y = 0; y < rows; ++y)
    std::memcpy(logit + (y0 + y) * g.W + x0, gradient + y * columns,
                sizeof(float) * static_cast<size_t>(columns));

  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t at = block * VL;
    const Taps taps(w.normalized + block * 9 * VL);
    const Vec bias = load(w.normalized_bias + at);
    const Vec gamma = load(w.gamma + at), beta = load(w.beta + at);
    double totals[GATE_SUMS * VL];
    Sums<GATE_SUMS> kept_sums(totals);
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t first = 0; first < columns; first += SPAN) {
        const float* above = z + block * g.plane + (y0 + y) * g.row + (x0 + first) * VL;
        const float* es = gradient + y * columns + first;
        Vec sum[GATE_SUMS] = {zero(), zero(), zero()};
        auto run = [&](auto count, int64_t x) __attribute__((always_inline)) {
          constexpr int N = decltype(count)::value;
          Vec hat[N];
          for (int i = 0; i < N; ++i) hat[i] = bias;
          convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps,
                      hat);
          Vec part[GATE_SUMS] = {zero(), zero(), zero()};
          for (int i = 0; i < N; ++i) {
            const Vec n = fma(gamma, hat[i], beta), e = splat(es[x + i]);
            const Vec kept = where_positive(n, e);
            part[SPATIAL_WEIGHT] = fma(max_keep_nan(zero(), n), e, part[SPATIAL_WEIGHT]);
            part[GRAD_N] = add(part[GRAD_N], kept);
            part[GRAD_N_HAT] = fma(kept, hat[i], part[GRAD_N_HAT]);
          }
          for (int j = 0; j < GATE_SUMS; ++j) sum[j] = add(sum[j], part[j]);
        };
        const int64_t width = columns - first < SPAN ? columns - first : SPAN;
        CASVIT_FOR_PIXEL_RUNS(width, run);
        kept_sums.add_to(0, sum);
        kept_sums.count(width);
      }
    kept_sums.flush();
    for (int i = 0; i < VL; ++i) {
      const double spatial = static_cast<double>(w.spatial[at + i]);
      sums[SPATIAL_WEIGHT * g.padded() + at + i] =
          static_cast<float>(totals[SPATIAL_WEIGHT * VL + i]);
      sums[GRAD_N * g.padded() + at + i] = static_cast<float>(totals[GRAD_N * VL + i] * spatial);
      sums[GRAD_N_HAT * g.padded() + at + i] =
          static_cast<float>(totals[GRAD_N_HAT * VL + i] * spatial);
    }
  }
}

template <int M>
CASVIT_INLINE void channel_gate_backward_of(const Geometry& g, const float* grad,
                                            const float* pooled, const float* weight, float scale,
                                            int64_t block, bool add_up, float* shift, float* to) {
  const int64_t padded = g.padded(), left = g.C - block * VL;
  const int channels = static_cast<int>(left < VL ? left : VL);
  weight += block * VL;
  Vec sum[M], mean[M];
  for (int m = 0; m < M; ++m) {
    sum[m] = zero();
    mean[m] = load(pooled + m * padded + block * VL);
  }
  for (int64_t o = 0; o < g.C; ++o) {
    const Vec row = load_first_as_float(weight + o * g.C, channels);
    for (int m = 0; m < M; ++m) sum[m] = fma(row, splat(grad[m * padded + o]), sum[m]);
    if (!to) continue;
    float* p = to + o * g.C + block * VL;
    Vec product = add_up ? load_first_as_float(p, channels) : zero();
    for (int m = 0; m < M; ++m) product = fma(mean[m], splat(grad[m * padded + o]), product);
    store_first(p, product, channels);
  }
  for (int m = 0; m < M; ++m) store(shift + m * padded + block * VL, mul(sum[m], splat(scale)));
}
static void channel_gate_backward(const Geometry& g, const float* grad, const float* pooled,
                                  const float* weight, float scale, int64_t images, int64_t block,
                                  float* shift, float* to) {
  for (int64_t i = 0; i < images;) {
    const int64_t at = i * g.padded();
    const bool four = i + 4 <= images;
    auto* f = four ? channel_gate_backward_of<4> : channel_gate_backward_of<1>;
    f(g, grad + at, pooled + at, weight, scale, block, i > 0, shift + at, to);
    i += four ? 4 : 1;
  }
}

// One gate: from the gradient at its logits to those at the depthwise convolution (gd) and at z.
static void backward_depthwise(const Geometry& g, const TrainingGate& w,
                               const BackwardDepthwise& io, int64_t which, int64_t image,
                               int64_t block, int64_t y_begin, int64_t y_end, double* totals,
                               float* temp) {
  const int64_t padded = g.padded(), at = block * VL;
  const float* z = io.planes + ((image * 3 + which) * g.blocks + block) * g.plane;
  const float* s = io.spatial + (image * 2 + which) * g.pixels();
  const float* logit = io.logit + (image * 2 + which) * g.pixels();
  const float* grad_sum = io.grad_sum + (image * g.blocks + block) * g.pixels() * VL;
  const int64_t vector = (which * io.images + image) * padded + at;
  const Vec gate = load(io.channel + vector), shift = load(io.shift + vector);
  const float* factors = io.coefficients + which * 3 * padded + at;
  const Vec by_grad = mul(load(factors), load(w.spatial + at)), constant = load(factors + padded),
            by_hat = load(factors + 2 * padded);
  const float *normalized = w.normalized + block * 9 * VL,
              *depthwise = w.depthwise + block * 9 * VL;
  const Vec bias = load(w.normalized_bias + at);
  const Vec gamma = load(w.gamma + at), beta = load(w.beta + at);
  const int64_t stride = 3 * g.C;
  const int channels = static_cast<int>(g.C - at < VL ? g.C - at : VL);
  float* grad_z = io.grad_qkv + image * g.pixels() * stride + which * g.C + at;

  // A ring of three rows of gd.
  std::memset(temp, 0, sizeof(float) * static_cast<size_t>(3 * g.row));
  auto ring = [&](int64_t y) { return temp + (y + 3) % 3 * g.row; };
  Sums<DEPTHWISE_SUMS> sums(totals);
  auto make_grad = [&](int64_t y) {
    float* to = ring(y) + VL;
    if (y < 0 || y >= g.H) return clear_row(g, ring(y));
    const bool own = y >= y_begin && y < y_end;
    const float *above = z + y * g.row, *es = logit + y * g.W;
    const Taps taps(normalized);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec hat[N];
      for (int i = 0; i < N; ++i) hat[i] = bias;
      convolve<N>({above + x * VL, above + g.row + x * VL, above + 2 * g.row + x * VL}, taps, hat);
      for (int i = 0; i < N; ++i) {
        const Vec kept = where_positive(fma(gamma, hat[i], beta), splat(es[x + i]));
        store(to + (x + i) * VL, fma(by_grad, kept, fma(by_hat, hat[i], constant)));
      }
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
    if (!own) return;
    for (int64_t first = 0; first < g.W; first += SPAN) {
      Vec products[9], sum = zero();
      for (int t = 0; t < 9; ++t) products[t] = zero();
      const float *above_span = above + first * VL, *grad_span = to + first * VL;
      auto weights = [&](auto count, int64_t x) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        Vec grad[N], part = zero();
        for (int i = 0; i < N; ++i) {
          grad[i] = load(grad_span + (x + i) * VL);
          part = add(part, grad[i]);
        }
        sum = add(sum, part);
        correlate<N>(
            {above_span + x * VL, above_span + g.row + x * VL, above_span + 2 * g.row + x * VL},
            grad, products);
      };
      const int64_t width = g.W - first < SPAN ? g.W - first : SPAN;
      CASVIT_FOR_PIXEL_RUNS(width, weights);
      sums.add_to(DEPTHWISE, products);
      sums.add_to(DEPTHWISE_BIAS, sum);
      sums.count(width);
    }
  };
  auto make_grad_z = [&](int64_t y) {
    const float *from = grad_sum + y * g.W * VL, *gates = s + y * g.W;
    float* to = grad_z + y * g.W * stride;
    const Taps back(depthwise, true);
    auto pixels = [&](auto count, int64_t x) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      Vec acc[N];
      for (int i = 0; i < N; ++i)
        acc[i] = mul(fma(load(from + (x + i) * VL), gate, shift), splat(gates[x + i]));
      convolve<N>({ring(y - 1) + x * VL, ring(y) + x * VL, ring(y + 1) + x * VL}, back, acc);
      for (int i = 0; i < N; ++i) store_first(to + (x + i) * stride, acc[i], channels);
    };
    CASVIT_FOR_PIXEL_RUNS(g.W, pixels);
  };
  make_grad(y_begin - 1);
  make_grad(y_begin);
  for (int64_t y = y_begin; y < y_end; ++y) {
    make_grad(y + 1);
    make_grad_z(y);
  }
  sums.flush();
}

}  // namespace CASVIT_ISA
}  // namespace casvit
