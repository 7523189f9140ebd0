#include "cpu/network/infer.h"

#include <cstring>

#include "cpu/network/scratch.h"
#include "cpu/network/team.h"

namespace casvit {
namespace {

struct Call {
  const Kernels& k;
  const NetworkPlan& p;
  Precision precision;
  const void* packed;
  const NetworkInput& in;
  const Output* outs;
};

struct Range {
  int64_t begin, end;
};

// One thread's part of the images of a group.
class Worker {
 public:
  Worker(const Call& call, const GroupShape& shape, const GroupArrays& arrays, int64_t first,
         Team& team, int64_t rank)
      : call_(call),
        k_(call.k),
        n_(call.k.network),
        p_(call.p),
        precision_(call.precision),
        words_(n_.words(precision_)),
        shape_(shape),
        arrays_(arrays),
        first_(first),
        team_(team),
        rank_(rank),
        temp_(arrays.temp + rank * arrays.temp_floats) {}

  // Stages of one slot image by image, then the others with all images. At each moment only one map
  // of a stage is alive.
  void run() {
    int64_t joint = 0;
    while (joint < p_.stages && shape_.stage[joint].slots < shape_.images) ++joint;
    NetworkWeights start(k_, precision_, call_.packed), weights = start;
    for (int64_t image = 0; image < shape_.images; ++image) {
      weights = start;
      int64_t out = 0;
      stem(weights.stem(p_), image, joint == 0 ? image : 0);
      for (int64_t s = 0; s < joint; ++s) {
        if (s > 0) embed(weights.embedding(p_, s), s, 0, 0, weights.next());
        layers(weights, s);
        returned(weights, s, {image, image + 1}, out);
      }
      if (0 < joint && joint < p_.stages) {
        NetworkWeights peek = weights;
        const Linear embedding = peek.embedding(p_, joint);
        embed(embedding, joint, 0, image,
              image + 1 < shape_.images ? embedding.weights : peek.next());
      }
    }
    int64_t out = 0;
    for (int64_t s = 0; s < joint; ++s) out += p_.stage[s].returned;
    for (int64_t s = joint; s < p_.stages; ++s) {
      if (s > 0) {
        const Linear embedding = weights.embedding(p_, s);
        if (s > joint)
          for (int64_t image = 0; image < shape_.images; ++image)
            embed(embedding, s, image, image,
                  image + 1 < shape_.images ? embedding.weights : weights.next());
      }
      layers(weights, s);
      returned(weights, s, {0, shape_.images}, out);
    }
    head(weights, out);
  }

 private:
  Range share(int64_t count) const {
    return {count * rank_ / team_.size(), count * (rank_ + 1) / team_.size()};
  }
  // Blocks of outputs in whole vectors; groups may be cut.
  Range share(const Linear& l) const { return share(l.blocks); }

  const StageShape& shape(int64_t s) const { return shape_.stage[s]; }
  float* map(int64_t s) const { return arrays_.stage[s].map[turn_]; }
  float* other(int64_t s) const { return arrays_.stage[s].map[1 - turn_]; }

  // --- Operands of the GEMMs.
  // A segment for each channel block: `words` K steps, `stride` words apart.
  Operand operand(const float* data, int64_t k_steps, int64_t words, int64_t stride) {
    int64_t s = 0;
    for (; k_steps > 0; ++s, k_steps -= words) {
      offset_[s] = s * stride;
      k_steps_[s] = std::min(k_steps, words);
    }
    return {data, s, offset_, k_steps_};
  }
  // Pixels [pixel, pixel + count) of a map; in bf16 converted into `words`.
  Operand of_map(const float* map, const StageShape& a, int64_t pixel, int64_t count,
                 float* words) {
    const float* from = map + pixel * k_.lanes;
    const int64_t k_steps = n_.k_steps(a.g.C, precision_);
    if (precision_ == Precision::F32) return operand(from, k_steps, words_, a.block_stride);
    n_.operand(from, a.block_stride, count, a.g.blocks, precision_, words);
    return operand(words, k_steps, words_, count * words_);
  }
  int64_t operand_floats(const StageShape& a, int64_t count) const {
    return precision_ == Precision::F32 ? 0 : a.g.blocks * count * words_;
  }
  void linear(const Linear& l, const Operand& a, int64_t count, const Range& blocks,
              const Epilogue& e, const float* next) const {
    n_.linear(l, a, precision_, count, blocks.begin, blocks.end, e, next);
  }
  static Range all(const Linear& l) { return {0, l.blocks}; }

  // --- Stem: rows of the first convolution in a ring of three, a row of the second at a time.
  void stem(const NetworkWeights::Stem& w, int64_t image, int64_t slot) {
    turn_ = 0;
    const StageShape& a = shape(0);
    const NetworkInput& in = call_.in;
    const int64_t size = in.bytes ? 1 : 4;
    const Image source{
        static_cast<const char*>(in.data) + (first_ + image) * in.batch_stride * size,
        in.bytes,
        p_.in_chans,
        in.H,
        in.W,
        in.channel_stride,
        in.row_stride,
        in.column_stride,
        w.padding};
    const int64_t stride = stem_row_stride((in.W + 1) / 2, k_.lanes);
    const int64_t words = n_.k_steps(p_.stem_mid, precision_);
    float* split = temp_ + 3 * words * stride;
    auto slot_of = [&](int64_t y) { return (y + 3) % 3 * words * stride; };
    auto make = [&](int64_t y) {
      n_.stem_row(source, w.first, precision_, y, split, temp_ + slot_of(y));
    };
    int64_t offset[9], k_steps[9];
    const Range rows = share(a.g.H);
    if (rows.begin < rows.end) make(2 * rows.begin - 1);
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      make(2 * y);
      make(2 * y + 1);
      for (int64_t t = 0; t < 9; ++t) {
        offset[t] = slot_of(2 * y - 1 + t / 3) + k_.lanes - 1 + t % 3;
        k_steps[t] = words;
      }
      Epilogue e{};
      e.kind = Epilogue::RELU;
      e.to = map(0) + (slot * a.g.pixels() + y * a.g.W) * k_.lanes;
      e.block_stride = a.block_stride;
      n_.stem_linear(w.second, {temp_, 9, offset, k_steps}, stride, precision_, a.g.W, e, nullptr);
    }
    if (image + 1 == shape_.images) team_.wait();
  }

  // --- From stage s - 1 to s, one image.
  void embed(const Linear& l, int64_t s, int64_t from_slot, int64_t slot, const float* next) {
    const StageShape &before = shape(s - 1), &a = shape(s);
    const float* from = map(s - 1) + from_slot * before.g.pixels() * k_.lanes;
    float* to = arrays_.stage[s].map[0] + slot * a.g.pixels() * k_.lanes;
    const Range pixels = a.by_blocks ? Range{0, a.g.pixels()} : share(a.g.pixels());
    const Range blocks = a.by_blocks ? share(l) : all(l);
    const int64_t C_steps = n_.k_steps(before.g.C, precision_);
    for (int64_t p = pixels.begin; p < pixels.end; p += a.gathered) {
      const int64_t count = std::min(a.gathered, pixels.end - p);
      n_.neighbourhoods(from, before.block_stride, before.g.H, before.g.W, before.g.blocks,
                        precision_, p, p + count, temp_);
      int64_t segments = 0;
      for (int64_t tap = 0; tap < 9; ++tap)
        for (int64_t b = 0; b < before.g.blocks; ++b, ++segments) {
          offset_[segments] = segments * count * words_;
          k_steps_[segments] = std::min(words_, C_steps - b * words_);
        }
      Epilogue e{};
      e.kind = Epilogue::STORE;
      e.to = to + p * k_.lanes;
      e.block_stride = a.block_stride;
      linear(l, {temp_, segments, offset_, k_steps_}, count, blocks, e,
             p + count < pixels.end ? l.weights : next);
    }
    if (slot + 1 == a.slots) {
      team_.wait();
      turn_ = 0;
    }
  }

  // --- The blocks of a stage.
  void layers(NetworkWeights& weights, int64_t s) {
    for (int64_t i = 0; i < p_.stage[s].depth; ++i) {
      const NetworkWeights::Block b = weights.block(p_.stage[s].C, p_.stage[s].hidden[i]);
      if (shape(s).by_blocks) by_blocks(b, s, weights.next());
      else by_rows(b, s, weights.next());
      turn_ = 1 - turn_;
    }
  }

  void by_rows(const NetworkWeights::Block& b, int64_t s, const float* next) {
    const StageShape& a = shape(s);
    const Range rows = share(a.rows());
    local_and_qkv(b, s, rows);
    team_.wait();
    const Range units = share(a.slots * a.strips.count * 2);
    for (int64_t u = units.begin; u < units.end; ++u) spatial_gate(b, s, u);
    team_.wait();
    channel_gates(b, s, share(a.g.blocks));
    team_.wait();
    for (int64_t row = rows.begin; row < rows.end;) {
      const int64_t slot = row / a.g.H, y = row % a.g.H;
      const int64_t end = std::min(a.g.H, y + rows.end - row);
      combine(b, s, slot, y, end, {0, a.g.blocks});
      row += end - y;
    }
    mlp(b, s, {rows.begin * a.g.W, rows.end * a.g.W}, next);
    team_.wait();
  }

  // x + LI(x) to the other map, and its q, k, v to the planes: rows, counted through the images.
  void local_and_qkv(const NetworkWeights::Block& b, int64_t s, const Range& rows) {
    const StageShape& a = shape(s);
    const Geometry& g = a.g;
    const int64_t W = g.W;
    const Ring ring = ring_of(s, rank_);
    int64_t done = rows.begin % g.H == 0 ? rows.begin : rows.begin - 1;
    for (int64_t ya = rows.begin; ya < rows.end; ya += a.tile_rows) {
      const int64_t yb = std::min(ya + a.tile_rows, rows.end);
      const int64_t need = yb % g.H == 0 ? yb : yb + 1;
      while (done < need) {
        const int64_t count = std::min(need - done, a.tile_rows);
        to_ring(b, s, ring, done, count);
        done += count;
      }
      const int64_t pixels = (yb - ya) * W;
      float* tile = temp_;
      n_.depthwise_gelu(ring, b.local, g.H, W, precision_, ya, yb, 0, g.blocks, pixels, tile);
      Epilogue e{};
      e.kind = Epilogue::ADD;
      e.to = other(s) + ya * W * k_.lanes;
      e.residual = map(s) + ya * W * k_.lanes;
      e.block_stride = a.block_stride;
      linear(b.local_out, operand(tile, b.local_out.k_steps, words_, pixels * words_), pixels,
             all(b.local_out), e, b.qkv.weights);
      qkv(b, s, ya, yb, tile, {0, 3 * g.blocks}, b.local_in.weights);
    }
  }
  void to_ring(const NetworkWeights::Block& b, int64_t s, const Ring& ring, int64_t y,
               int64_t count) {
    const StageShape& a = shape(s);
    const int64_t W = a.g.W, pixels = count * W;
    for (int64_t i = 0; i < pixels; ++i)
      places_[i] = (y + i / W) % ring.slots * ring.row + (1 + i % W) * k_.lanes;
    Epilogue e{};
    e.kind = Epilogue::PLACES;
    e.to = ring.data;
    e.block_stride = ring.plane;
    e.places = places_;
    linear(b.local_in, of_map(map(s), a, y * W, pixels, temp_), pixels, all(b.local_in), e,
           b.local_out.weights);
  }
  Ring ring_of(int64_t s, int64_t rank) const {
    const StageShape& a = shape(s);
    float* data = arrays_.stage[s].rings + (a.by_blocks ? 0 : rank * arrays_.stage[s].ring_floats);
    const int64_t rows = a.ring_rows();
    return {data, rows * a.g.row, a.g.row, rows, data + a.g.blocks * rows * a.g.row};
  }
  // Of rows [ya, yb) of the other map.
  void qkv(const NetworkWeights::Block& b, int64_t s, int64_t ya, int64_t yb, float* words,
           const Range& blocks, const float* next) {
    const StageShape& a = shape(s);
    const Geometry& g = a.g;
    const int64_t pixels = (yb - ya) * g.W;
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t row = ya + i / g.W;
      places_[i] =
          row / g.H * a.image_floats() + (row % g.H + 1) * g.row + (1 + i % g.W) * k_.lanes;
    }
    Epilogue e{};
    e.kind = Epilogue::PLACES;
    e.to = arrays_.stage[s].planes;
    e.block_stride = g.plane;
    e.places = places_;
    linear(b.qkv, of_map(other(s), a, ya * g.W, pixels, words), pixels, blocks, e, next);
  }

  // --- Gates. A unit: a strip of q or k of an image.
  void spatial_gate(const NetworkWeights::Block& b, int64_t s, int64_t unit) const {
    const StageShape& a = shape(s);
    const int64_t which = unit % 2, strip = unit / 2 % a.strips.count,
                  map = unit / 2 / a.strips.count * 2 + which;
    k_.spatial_gate(a.g, b.gate[which], plane(s, map / 2, which), a.strips, strip,
                    arrays_.spatial + map * a.g.pixels(),
                    arrays_.sums + (map * a.strips.count + strip) * a.g.padded(), temp_);
  }
  const float* plane(int64_t s, int64_t slot, int64_t which) const {
    const StageShape& a = shape(s);
    return arrays_.stage[s].planes + slot * a.image_floats() + which * a.g.blocks * a.g.plane;
  }
  // The means over the image are made by each thread for itself.
  void channel_gates(const NetworkWeights::Block& b, int64_t s, const Range& blocks) const {
    const StageShape& a = shape(s);
    const int64_t padded = a.g.padded();
    const float scale = 1.0f / static_cast<float>(a.g.pixels());
    if (blocks.begin == blocks.end) return;
    for (int64_t which = 0; which < 2; ++which) {
      float* pooled = temp_ + which * a.slots * padded;
      for (int64_t slot = 0; slot < a.slots; ++slot) {
        float* to = pooled + slot * padded;
        const float* from = arrays_.sums + (slot * 2 + which) * a.strips.count * padded;
        for (int64_t c = 0; c < padded; ++c) to[c] = from[c];
        for (int64_t i = 1; i < a.strips.count; ++i)
          for (int64_t c = 0; c < padded; ++c) to[c] += from[i * padded + c];
        for (int64_t c = 0; c < padded; ++c) to[c] *= scale;
      }
      k_.channel_gate(a.g, b.gate[which], pooled, arrays_.gates + which * a.slots * padded, a.slots,
                      blocks.begin, blocks.end);
    }
  }
  void combine(const NetworkWeights::Block& b, int64_t s, int64_t slot, int64_t y_begin,
               int64_t y_end, const Range& blocks) const {
    const StageShape& a = shape(s);
    const int64_t padded = a.g.padded();
    const float* const gates[2] = {arrays_.gates + slot * padded,
                                   arrays_.gates + (a.slots + slot) * padded};
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      n_.combine(a.g, b.dwc, b.proj, plane(s, slot, 0), arrays_.spatial + slot * 2 * a.g.pixels(),
                 gates, block, y_begin, y_end,
                 other(s) + block * a.block_stride + slot * a.g.pixels() * k_.lanes, temp_);
  }

  // --- Mlp of the other map, in place.
  void mlp(const NetworkWeights::Block& b, int64_t s, const Range& pixels, const float* next) {
    const StageShape& a = shape(s);
    for (int64_t p = pixels.begin; p < pixels.end; p += a.tile_pixels) {
      const int64_t count = std::min(a.tile_pixels, pixels.end - p);
      float* hidden = temp_ + operand_floats(a, count);
      linear(b.fc1, of_map(other(s), a, p, count, temp_), count, all(b.fc1),
             to_hidden(hidden, count), b.fc2.weights);
      linear(b.fc2, operand(hidden, b.fc2.k_steps, words_, count * words_), count, all(b.fc2),
             onto(other(s) + p * k_.lanes, a), p + count < pixels.end ? b.fc1.weights : next);
    }
  }
  Epilogue to_hidden(float* hidden, int64_t count) const {
    Epilogue e{};
    e.kind = Epilogue::GELU;
    e.to = hidden;
    e.block_stride = count * words_;
    return e;
  }
  Epilogue onto(float* to, const StageShape& a) const {
    Epilogue e{};
    e.kind = Epilogue::ADD;
    e.to = to;
    e.residual = to;
    e.block_stride = a.block_stride;
    return e;
  }

  // --- Small maps: threads share the blocks of each layer.
  void by_blocks(const NetworkWeights::Block& b, int64_t s, const float* next) {
    const StageShape& a = shape(s);
    const Geometry& g = a.g;
    const int64_t pixels = a.rows() * g.W;
    const Ring ring = ring_of(s, 0);
    const Range own = share(g.blocks);
    for (int64_t i = 0; i < pixels; ++i) places_[i] = i / g.W * ring.row + (1 + i % g.W) * k_.lanes;
    Epilogue e{};
    e.kind = Epilogue::PLACES;
    e.to = ring.data;
    e.block_stride = ring.plane;
    e.places = places_;
    linear(b.local_in, of_map(map(s), a, 0, pixels, temp_), pixels, own, e, nullptr);
    float* local = arrays_.stage[s].local;
    n_.depthwise_gelu(ring, b.local, g.H, g.W, precision_, 0, a.rows(), own.begin, own.end, pixels,
                      local);
    team_.wait();
    e = onto(other(s), a);
    e.residual = map(s);
    linear(b.local_out, operand(local, b.local_out.k_steps, words_, pixels * words_), pixels, own,
           e, nullptr);
    team_.wait();
    qkv(b, s, 0, a.rows(), temp_, share(b.qkv), nullptr);
    team_.wait();
    const Range units = share(a.slots * a.strips.count * 2);
    for (int64_t u = units.begin; u < units.end; ++u) spatial_gate(b, s, u);
    team_.wait();
    channel_gates(b, s, own);  // of the very blocks that are combined
    for (int64_t slot = 0; slot < a.slots; ++slot) combine(b, s, slot, 0, g.H, own);
    team_.wait();
    float* hidden = arrays_.stage[s].hidden;
    linear(b.fc1, of_map(other(s), a, 0, pixels, temp_), pixels, share(b.fc1),
           to_hidden(hidden, pixels), nullptr);
    team_.wait();
    linear(b.fc2, operand(hidden, b.fc2.k_steps, words_, pixels * words_), pixels, share(b.fc2),
           onto(other(s), a), next);
    team_.wait();
  }

  // --- Outputs.
  void returned(NetworkWeights& weights, int64_t s, const Range& images, int64_t& out) const {
    if (!p_.stage[s].returned) return;
    const NetworkWeights::Affine affine = weights.affine(p_.stage[s].C);
    for (int64_t image = images.begin; image < images.end; ++image)
      scaled(affine, s, image, call_.outs[out]);
    ++out;
  }
  void scaled(const NetworkWeights::Affine& w, int64_t s, int64_t image, const Output& out) const {
    const StageShape& a = shape(s);
    const int64_t slot = a.slots == 1 ? 0 : image;
    const Range pixels = share(a.g.pixels());
    for (int64_t block = 0; block < a.g.blocks; ++block)
      n_.scaled(a.g, map(s) + block * a.block_stride + slot * a.g.pixels() * k_.lanes, w.scale,
                w.shift, block, pixels.begin, pixels.end, out, first_ + image, temp_);
  }
  void head(NetworkWeights& weights, int64_t at) {
    if (p_.head == NetworkPlan::NOTHING) return;
    const int64_t s = p_.stages - 1, C = p_.stage[s].C;
    const StageShape& a = shape(s);
    const Output& out = call_.outs[at];
    if (p_.head == NetworkPlan::MAP) {
      const NetworkWeights::Affine affine = weights.affine(C);
      for (int64_t image = 0; image < shape_.images; ++image) scaled(affine, s, image, out);
      return;
    }
    // [block][image][lanes]: a map whose pixels are the images
    const Range blocks = share(a.g.blocks);
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t image = 0; image < shape_.images; ++image)
        n_.mean(map(s) + block * a.block_stride + image * a.g.pixels() * k_.lanes, a.g.pixels(),
                arrays_.pooled + (block * shape_.images + image) * k_.lanes);
    team_.wait();
    float* rows = static_cast<float*>(out.data);
    if (p_.head == NetworkPlan::POOLED) {
      const NetworkWeights::Affine affine = weights.affine(C);
      const Range images = share(shape_.images);
      for (int64_t image = images.begin; image < images.end; ++image)
        for (int64_t c = 0; c < C; ++c)
          rows[(first_ + image) * C + c] =
              arrays_.pooled[(c / k_.lanes * shape_.images + image) * k_.lanes + c % k_.lanes] *
                  affine.scale[c] +
              affine.shift[c];
      return;
    }
    const Linear l = weights.head(p_);
    Epilogue e{};
    e.kind = Epilogue::ROWS;
    e.to = rows + first_ * p_.classes;
    e.row = p_.classes;
    const Range own = share(l);
    n_.linear(l, operand(arrays_.pooled, C, k_.lanes, shape_.images * k_.lanes), Precision::F32,
              shape_.images, own.begin, own.end, e, nullptr);
  }

  const Call& call_;
  const Kernels& k_;
  const NetworkKernels& n_;
  const NetworkPlan& p_;
  const Precision precision_;
  const int64_t words_;
  const GroupShape& shape_;
  const GroupArrays& arrays_;
  const int64_t first_;
  Team& team_;
  const int64_t rank_;
  float* const temp_;
  int turn_ = 0;  // which map of a stage is the last
  int64_t places_[MOST_PLACES];
  int64_t offset_[MOST_SEGMENTS], k_steps_[MOST_SEGMENTS];
};

// What a scratch was made for: then its halos are zero.
struct Stamp {
  int64_t magic, plan, batch, H, W, precision, threads;
  char isa[40];
};
constexpr int64_t STAMP_MAGIC = 0x504d415453564143;  // "CAVSTAMP"
constexpr int64_t STAMP_BYTES = aligned(sizeof(Stamp));

// How a batch is cut: each thread has `each` images of its own, in groups of `together`; the rest
// is everybody's. And the arrays for that, in the scratch.
struct Layout {
  int64_t each, together, rest;
  GroupShape alone, shared;

  Layout(const Kernels& k, const NetworkPlan& p, Precision precision, int64_t batch, int64_t H,
         int64_t W, int64_t threads)
      : each(batch / threads),
        together(images_together(p, each, H, W)),
        rest(batch - each * threads),
        alone(k, p, precision, std::max<int64_t>(1, together), 1, H, W),
        shared(k, p, precision, std::max<int64_t>(1, rest), threads, H, W) {}

  static int64_t images_together(const NetworkPlan& p, int64_t each, int64_t H, int64_t W) {
    for (int64_t s = 0; s <= p.stages; ++s) H = (H + 1) / 2, W = (W + 1) / 2;
    if (each <= 1 || H * W > JOINT) return std::min<int64_t>(each, 1);
    return divide_up(each, divide_up(each, TOGETHER));
  }
};

uint64_t hash_of(const NetworkPlan& p) {
  uint64_t h = 14695981039346656037u;
  auto mix = [&](int64_t value) { h = (h ^ static_cast<uint64_t>(value)) * 1099511628211u; };
  mix(p.in_chans);
  mix(p.stem_mid);
  mix(p.stages);
  for (int64_t s = 0; s < p.stages; ++s) {
    mix(p.stage[s].C);
    mix(p.stage[s].depth);
    mix(p.stage[s].returned);
    for (int64_t i = 0; i < p.stage[s].depth; ++i) mix(p.stage[s].hidden[i]);
  }
  mix(p.head);
  mix(p.classes);
  return h;
}

}  // namespace

int64_t network_scratch_bytes(const Kernels& k, const NetworkPlan& p, Precision precision,
                              int64_t batch, int64_t H, int64_t W, int64_t threads) {
  int64_t most = 0;
  for (int64_t size = 1; size <= threads; ++size) {  // fewer threads than asked for may come
    const Layout l(k, p, precision, batch, H, W, size);
    Floats alone(nullptr), shared(nullptr);
    if (l.each > 0) GroupArrays(k, p, precision, l.alone, alone);
    if (l.rest > 0) GroupArrays(k, p, precision, l.shared, shared);
    most = std::max(most, STAMP_BYTES + size * alone.bytes() + shared.bytes());
  }
  return most;
}

void infer_network(const Kernels& k, const NetworkPlan& p, Precision precision, const void* packed,
                   const NetworkInput& in, const Output* outs, void* scratch,
                   const ThreadPool& given) {
  ThreadPool pool = given;
  if (in_forked_child()) pool.threads = 1;
  const Call call{k, p, precision, packed, in, outs};
  with_team(pool, [&](Team& team, int64_t rank) {
    const int64_t threads = team.size();
    const Layout l(k, p, precision, in.batch, in.H, in.W, threads);
    Stamp stamp{STAMP_MAGIC, static_cast<int64_t>(hash_of(p)), in.batch, in.H,
                in.W,        static_cast<int64_t>(precision),  threads,  {}};
    std::memcpy(stamp.isa, k.name, std::min(std::strlen(k.name), sizeof stamp.isa));
    const bool clear = std::memcmp(scratch, &stamp, sizeof stamp) != 0;
    team.wait();  // all have read the stamp
    Floats floats(static_cast<char*>(scratch) + STAMP_BYTES);
    if (l.each > 0)
      for (int64_t t = 0; t < threads; ++t) {
        const GroupArrays arrays(k, p, precision, l.alone, floats);
        if (t != rank) continue;
        if (clear) arrays.clear_halos(p, l.alone);
        Team alone;
        for (int64_t i = 0; i < l.each; i += l.together) {
          // The last group may take images of the one before it again: all groups are alike.
          const int64_t first = std::min(i, l.each - l.together);
          Worker(call, l.alone, arrays, rank * l.each + first, alone, 0).run();
        }
      }
    if (l.rest > 0) {
      const GroupArrays arrays(k, p, precision, l.shared, floats);
      if (clear && rank == 0) arrays.clear_halos(p, l.shared);
      team.wait();
      Worker(call, l.shared, arrays, in.batch - l.rest, team, rank).run();
    }
    if (clear) {
      team.wait();
      if (rank == 0) std::memcpy(scratch, &stamp, sizeof stamp);
    }
  });
}

}  // namespace casvit
