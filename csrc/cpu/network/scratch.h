// Where the arrays of a call lie in its scratch: once for the images that one thread computes
// alone, for each thread, and once for those that all compute together.
#pragma once

#include <algorithm>

#include "cpu/network/weights.h"

namespace casvit {

constexpr int64_t TILE = 112;               // pixels of a tile of local integration, about
constexpr int64_t STRIP = 112;              // of a strip of the spatial gates, at most
constexpr int64_t JOINT = 400;              // maps of at most so many pixels: images go together
constexpr int64_t TOGETHER = 8;             // so many of them
constexpr int64_t HIDDEN_BYTES = 400000;    // of the tile between the layers of an Mlp
constexpr int64_t GATHERED_BYTES = 262144;  // of a tile of neighbourhoods

constexpr int64_t MOST_PLACES = 4096;  // pixels of a tile that goes to planes
// Wider images than this have rows of more.
constexpr int64_t MOST_IMAGE_SIDE = 4 * MOST_PLACES;

// One stage of a group of images.
struct StageShape {
  Geometry g;
  Strips strips;
  int64_t slots;          // images in its arrays: one, or all of the group
  bool by_blocks;         // threads share a layer's outputs, not its pixels
  int64_t tile_rows;      // of local integration
  int64_t tile_pixels;    // of the Mlp
  int64_t gathered;       // output pixels of the embedding in front of it, at a time
  int64_t block_stride;   // of its maps, in floats
  int64_t hidden_blocks;  // of its widest Mlp
  int64_t image_floats() const { return 3 * g.blocks * g.plane; }
  int64_t rows() const { return slots * g.H; }
  int64_t ring_rows() const { return by_blocks ? rows() : std::min(tile_rows + 2, rows()); }
};

struct GroupShape {
  int64_t images, threads;
  int64_t H0, W0;  // of the image
  StageShape stage[NetworkPlan::MOST_STAGES];
  int64_t temp_floats;

  GroupShape(const Kernels& k, const NetworkPlan& p, Precision precision, int64_t images,
             int64_t threads, int64_t H, int64_t W)
      : images(images), threads(threads), H0(H), W0(W), temp_floats(0) {
    const int64_t words = k.network.words(precision);
    auto at_least = [&](int64_t floats) { temp_floats = std::max(temp_floats, floats); };
    const int64_t W1 = (W + 1) / 2, stem_stride = stem_row_stride(W1, k.lanes);
    at_least(3 * k.network.k_steps(p.stem_mid, precision) * stem_stride +
             stem_split_floats(p.in_chans, W1, k.lanes));
    H = (H + 1) / 2;
    W = W1;
    for (int64_t s = 0; s < p.stages; ++s) {
      H = (H + 1) / 2;
      W = (W + 1) / 2;
      StageShape& a = stage[s];
      a.g = make_geometry(p.stage[s].C, H, W, k.lanes);
      a.strips = make_strips(a.g, STRIP);
      a.slots = threads > 1 || H * W <= JOINT ? images : 1;
      a.by_blocks = threads > 1 && a.slots * H * W < std::min(64 * threads, MOST_PLACES);
      a.tile_rows = std::max<int64_t>(1, TILE / W);
      a.block_stride = a.slots * H * W * k.lanes;
      if (a.block_stride * 4 % 1024 == 0) a.block_stride += 16;  // blocks must not share cache sets
      a.hidden_blocks = 0;
      for (int64_t i = 0; i < p.stage[s].depth; ++i)
        a.hidden_blocks = std::max(a.hidden_blocks, divide_up(p.stage[s].hidden[i], k.lanes));
      auto fitting = [&](int64_t floats_a_pixel, int64_t bytes) {
        int64_t pixels = TILE;
        while (pixels > 14 && pixels * floats_a_pixel * 4 > bytes) pixels /= 2;
        return pixels;
      };
      a.tile_pixels = fitting(a.hidden_blocks * words, HIDDEN_BYTES);
      if (s > 0) {
        const int64_t each = 9 * stage[s - 1].g.blocks * words;
        a.gathered = fitting(each, GATHERED_BYTES);
        at_least(a.gathered * each);
      }
      const int64_t tile = std::max(a.by_blocks ? a.slots * H * W : a.tile_rows * W, a.tile_pixels);
      at_least(tile * a.g.blocks * words * 2);                           // local integration
      at_least(a.tile_pixels * (a.g.blocks + a.hidden_blocks) * words);  // Mlp
      at_least((a.strips.rows * a.strips.columns + k.lanes) * k.lanes);
      at_least(6 * a.g.row);
      at_least((SCALED_PIXELS + k.lanes) * k.lanes);
      at_least(2 * a.slots * a.g.padded());  // pooled
    }
  }
};

class Floats {
 public:
  explicit Floats(void* base) : base_(static_cast<char*>(base)), at_(0) {}
  float* take(int64_t count) {
    float* here = reinterpret_cast<float*>(base_ + at_);
    at_ = aligned(at_ + count * 4);
    return here;
  }
  int64_t bytes() const { return at_; }

 private:
  char* base_;
  int64_t at_;
};

struct GroupArrays {
  struct Stage {
    float* map[2];
    float* planes;  // [slots][q, k, v][blocks] planes
    float* rings;   // [threads, or one]: [blocks][rows][W + 2] and a row of zeros
    int64_t ring_floats;
    float* local;  // by blocks: the operands between two layers
    float* hidden;
  } stage[NetworkPlan::MOST_STAGES];
  float* spatial;  // [slots][2][pixels]
  float* sums;     // [slots][2][strips][padded]
  float* gates;    // [2][slots][padded]
  float* pooled;   // [blocks][images][lanes], of the head
  float* temp;     // [threads]
  int64_t temp_floats;

  GroupArrays(const Kernels& k, const NetworkPlan& p, Precision precision, const GroupShape& shape,
              Floats& from) {
    const int64_t words = k.network.words(precision);
    int64_t spatial_floats = 0, sum_floats = 0, gate_floats = 0;
    for (int64_t s = 0; s < p.stages; ++s) {
      const StageShape& a = shape.stage[s];
      const int64_t pixels = a.slots * a.g.pixels();
      for (float*& map : stage[s].map) map = from.take(a.g.blocks * a.block_stride);
      stage[s].planes = from.take(a.slots * a.image_floats());
      stage[s].ring_floats = aligned((a.g.blocks * a.ring_rows() + 1) * a.g.row * 4) / 4;
      stage[s].rings = from.take(stage[s].ring_floats * (a.by_blocks ? 1 : shape.threads));
      stage[s].local = from.take(a.by_blocks ? a.g.blocks * pixels * words : 0);
      stage[s].hidden = from.take(a.by_blocks ? a.hidden_blocks * pixels * words : 0);
      spatial_floats = std::max(spatial_floats, 2 * pixels + k.lanes);
      sum_floats = std::max(sum_floats, a.slots * 2 * a.strips.count * a.g.padded());
      gate_floats = std::max(gate_floats, 2 * a.slots * a.g.padded());
    }
    spatial = from.take(spatial_floats);
    sums = from.take(sum_floats);
    gates = from.take(gate_floats);
    pooled = from.take(shape.stage[p.stages - 1].g.padded() * shape.images);
    temp_floats = aligned(shape.temp_floats * 4) / 4;
    temp = from.take(temp_floats * shape.threads);
  }

  // Zeros around the planes and the rings, which no kernel writes; so they stay for later calls.
  void clear_halos(const NetworkPlan& p, const GroupShape& shape) const {
    for (int64_t s = 0; s < p.stages; ++s) {
      const StageShape& a = shape.stage[s];
      const Geometry& g = a.g;
      for (int64_t i = 0; i < a.slots * 3 * g.blocks; ++i) {
        float* plane =
            stage[s].planes + i / (3 * g.blocks) * a.image_floats() + i % (3 * g.blocks) * g.plane;
        std::fill_n(plane, g.row, 0.0f);
        std::fill_n(plane + (g.H + 1) * g.row, g.plane - (g.H + 1) * g.row, 0.0f);
        clear_sides(plane + g.row, g.H, g);
      }
      for (int64_t t = 0; t < (a.by_blocks ? 1 : shape.threads); ++t) {
        float* ring = stage[s].rings + t * stage[s].ring_floats;
        clear_sides(ring, g.blocks * a.ring_rows(), g);
        std::fill_n(ring + g.blocks * a.ring_rows() * g.row, g.row, 0.0f);
      }
    }
  }

 private:
  static void clear_sides(float* rows, int64_t count, const Geometry& g) {
    for (int64_t y = 0; y < count; ++y) {
      std::fill_n(rows + y * g.row, g.lanes, 0.0f);
      std::fill_n(rows + (y + 1) * g.row - g.lanes, g.lanes, 0.0f);
    }
  }
};

}  // namespace casvit
