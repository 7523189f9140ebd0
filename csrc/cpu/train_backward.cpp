// The phases of the backward pass from grad to the gradients at q, k and v.
#include "cpu/train_qkv.h"
#include "cpu/train_units.h"

namespace casvit {

void backward_combine(const TrainingProblem& p, const WeightsView& w, const Input& grad,
                      const float* qkv, const float* spatial, const float* channel,
                      const CombineGradients& to) {
  const Geometry& g = p.geometry;
  const Bands bands = make_bands(g, p.images);
  const int64_t sums = Partials::size(p, bands, COMBINE_SUMS);
  const int64_t maps = p.images * g.blocks * 2 * g.pixels(), vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<double>(sums) + Arrays::bytes<float>(maps) +
                Arrays::bytes<float>(vectors));
  const Partials partials{g, bands.count, COMBINE_SUMS, arrays.take<double>(sums)};
  float* pixel = arrays.take<float>(maps);
  float* gates = arrays.take<float>(vectors);
  pad(g, 2 * p.images, channel, gates);
  const BackwardCombine io{&grad, qkv, spatial, gates, p.images, to.grad_qkv, to.grad_sum, pixel};
  for_bands(p, bands,
            [&](int64_t image, int64_t block, int64_t band, int64_t y_begin, int64_t y_end) {
              p.kernels.backward_combine(g, w, io, image, block, y_begin, y_end,
                                         partials.at(image, band, block),
                                         task_floats(backward_combine_temp_floats(g, bands)));
            });
  const int64_t map = 2 * g.pixels();
  parallel_for(p.pool, p.images, [&](int64_t image) {
    const float* from = pixel + image * g.blocks * map;
    for (int64_t first = 0; first < map; first += 64) {
      const int64_t count = map - first < 64 ? map - first : 64;
      double sum[64] = {};
      for (int64_t block = 0; block < g.blocks; ++block)
        for (int64_t i = 0; i < count; ++i)
          sum[i] += static_cast<double>(from[block * map + first + i]);
      for (int64_t i = 0; i < count; ++i)
        to.pixel[image * map + first + i] = static_cast<float>(sum[i]);
    }
  });
  parallel_for(p.pool, g.blocks, [&](int64_t block) {
    const int64_t c = block * g.lanes;
    partials.merge(0, p.images, block, DWC, 9, to.dwc_weight + c * 9, 9);
    partials.merge(0, p.images, block, PROJ, 9, to.proj_weight + c * 9, 9);
    partials.merge(0, p.images, block, DWC_BIAS, 1, to.dwc_bias + c, 1);
    partials.merge(0, p.images, block, PROJ_BIAS, 1, to.proj_bias + c, 1);
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t image = 0; image < p.images; ++image)
        partials.merge(image, image + 1, block, CHANNEL_SUM + i, 1,
                       to.channel + (i * p.images + image) * g.C + c, 1);
  });
}

void backward_channel_gate(const TrainingProblem& p, const Sources& s, const float* sum,
                           const float* pooled, const float* channel, float* shift,
                           float* const (&grad_weight)[2]) {
  const Geometry& g = p.geometry;
  const int64_t rows = 2 * p.images, vectors = rows * g.padded(), square = g.C * g.C;
  Arrays arrays(3 * Arrays::bytes<float>(vectors) + 2 * Arrays::bytes<float>(square));
  float *grads = arrays.take<float>(vectors), *means = arrays.take<float>(vectors);
  float* shifts = arrays.take<float>(vectors);
  const float* weights[2];
  for (int i = 0; i < 2; ++i)
    weights[i] = dense_matrix(s.gate[i].channel_weight, g.C, g.C, arrays.take<float>(square));
  pad(g, rows, sum, grads);
  pad(g, rows, pooled, means);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < g.C; ++c) {
      const float gate = channel[r * g.C + c];
      grads[r * g.padded() + c] *= gate * (1.0f - gate);
    }
  const float scale = 1.0f / static_cast<float>(g.pixels());
  parallel_for(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, at = which * p.images * g.padded();
    p.kernels.channel_gate_backward(g, grads + at, means + at, weights[which], scale, p.images,
                                    i % g.blocks, shifts + at, grad_weight[which]);
  });
  unpad(g, rows, shifts, shift);
}

void coefficients(const TrainingProblem& p, const Sources& s, const float* sums,
                  const bool (&batch)[2], float* to) {
  const int64_t C = s.C;
  const double number = static_cast<double>(p.images * p.geometry.pixels());
  for (int i = 0; i < 2; ++i, to += 3 * C, sums += 2 * C)
    for (int64_t c = 0; c < C; ++c) {
      const double scale = batch_norm_scale(s.gate[i], c), each = -scale / number;
      to[c] = static_cast<float>(scale);
      // A frozen gate has no such term. 0 * sums would spread a NaN of one image to the others.
      to[C + c] = batch[i] ? static_cast<float>(static_cast<double>(sums[c]) * each) : 0.0f;
      to[2 * C + c] = batch[i] ? static_cast<float>(static_cast<double>(sums[C + c]) * each) : 0.0f;
    }
}

void backward_gate(const TrainingProblem& p, const TrainingGates& w, const float* qkv,
                   const float* spatial, const float* pixel, const float* shift,
                   const GateGradients& to) {
  const Geometry& g = p.geometry;
  const Strips strips = make_strips(g);
  const int64_t units = p.images * 2 * strips.count, each = GATE_SUMS * g.padded();
  const int64_t vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<float>(units * each) + Arrays::bytes<float>(vectors));
  float* sums = arrays.take<float>(units * each);  // [images][2][strips][GATE_SUMS][padded]
  float* shifts = arrays.take<float>(vectors);
  pad(g, 2 * p.images, shift, shifts);
  parallel_for(p.pool, units, [&](int64_t i) {
    const int64_t strip = i % strips.count, map = i / strips.count;
    const int64_t image = map / 2, which = map % 2;
    p.kernels.backward_gate(g, w.gate[which], qkv + (image * 3 + which) * g.blocks * g.plane,
                            spatial + map * g.pixels(), pixel + map * g.pixels(),
                            shifts + (which * p.images + image) * g.padded(), strip,
                            to.logit + map * g.pixels(), sums + i * each,
                            task_floats(backward_gate_temp_floats(g)));
  });
  parallel_for(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, block = i % g.blocks;
    double total[GATE_SUMS][16] = {};
    for (int64_t image = 0; image < p.images; ++image)
      for (int64_t strip = 0; strip < strips.count; ++strip) {
        const float* from =
            sums + ((image * 2 + which) * strips.count + strip) * each + block * g.lanes;
        for (int64_t s = 0; s < GATE_SUMS; ++s)
          for (int64_t c = 0; c < g.lanes; ++c)
            total[s][c] += static_cast<double>(from[s * g.padded() + c]);
      }
    for (int64_t c = 0; c < channels_of(g, block); ++c) {
      const int64_t channel = block * g.lanes + c;
      to.spatial_weight[which][channel] = static_cast<float>(total[SPATIAL_WEIGHT][c]);
      to.sums[which * 2 * g.C + channel] = static_cast<float>(total[GRAD_N][c]);
      to.sums[(which * 2 + 1) * g.C + channel] = static_cast<float>(total[GRAD_N_HAT][c]);
    }
  });
}

void backward_depthwise(const TrainingProblem& p, const TrainingGates& w, const float* qkv,
                        const float* spatial, const float* channel, const float* shift,
                        const float* logit, const float* coefficients, const float* grad_sum,
                        const DepthwiseGradients& to, const QkvGradients* qkv_gradients) {
  const Geometry& g = p.geometry;
  const Bands bands = make_bands(g, p.images);
  const int64_t sums = Partials::size(p, bands, 2 * DEPTHWISE_SUMS);
  const int64_t vectors = 2 * p.images * g.padded();
  Arrays arrays(Arrays::bytes<double>(sums) + 2 * Arrays::bytes<float>(vectors) +
                Arrays::bytes<float>(6 * g.padded()));
  const Partials partials{g, bands.count, 2 * DEPTHWISE_SUMS, arrays.take<double>(sums)};
  float* gates = arrays.take<float>(vectors);
  float* shifts = arrays.take<float>(vectors);
  float* factors = arrays.take<float>(6 * g.padded());
  pad(g, 2 * p.images, channel, gates);
  pad(g, 2 * p.images, shift, shifts);
  pad(g, 6, coefficients, factors);
  const BackwardDepthwise io{qkv,     spatial,  gates,    shifts,     logit,
                             factors, grad_sum, p.images, to.grad_qkv};
  auto unit = [&](int64_t image, int64_t block, int64_t band, int64_t y_begin, int64_t y_end) {
    double* to_sums = partials.at(image, band, block);
    for (int64_t i = 0; i < 2; ++i)
      p.kernels.backward_depthwise(g, w.gate[i], io, i, image, block, y_begin, y_end,
                                   to_sums + i * DEPTHWISE_SUMS * g.lanes,
                                   task_floats(backward_depthwise_temp_floats(g)));
  };
  if (qkv_gradients && QkvBackward::goes_by_images(p)) {
    const QkvBackward gemm_backward(p, to.grad_qkv, *qkv_gradients, true);
    parallel_for(p.pool, p.images, [&](int64_t image) {
      for_bands_of(p, bands, image, unit);
      gemm_backward.image(image);
    });
    gemm_backward.finish();
  } else {
    for_bands(p, bands, unit);
    if (qkv_gradients) qkv_backward(p, to.grad_qkv, *qkv_gradients);
  }
  parallel_for(p.pool, 2 * g.blocks, [&](int64_t i) {
    const int64_t which = i / g.blocks, block = i % g.blocks;
    const int64_t begin = which * DEPTHWISE_SUMS, c = block * g.lanes;
    partials.merge(0, p.images, block, begin + DEPTHWISE, 9, to.weight[which] + c * 9, 9);
    partials.merge(0, p.images, block, begin + DEPTHWISE_BIAS, 1, to.bias[which] + c, 1);
  });
}

}  // namespace casvit
