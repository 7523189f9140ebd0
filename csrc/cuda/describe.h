// Plans in words for people: a JSON text, for `casvit-kernels plan`.
#pragma once

#include <string>

#include "plan.h"

namespace casvit::cuda {

inline std::string describe(const Problem& p) {
  const Plans of = plans(p);
  const Maps m = maps(p);
  const struct {
    const char* name;
    const Plan& plan;
    int gates;  // blocks for q and for k
    bool chosen = true;
  } kernels[] = {{"gates", of.gates, 2, !of.single_pass_first()},
                 {"statistics", of.statistics, 2},
                 {"combine", of.combine, 1, !of.single_pass_first()},
                 {"single_pass", of.single_pass, 1, of.single_pass_first()},
                 {"backward_combine", of.backward_combine, 1},
                 {"backward_gate", of.backward_gate, 2},
                 {"backward_depthwise", of.backward_depthwise, 2}};
  std::string text = "[";
  for (const auto& k : kernels) {
    const Cut& c = k.plan.cut;
    const auto put = [&](const char* name, long long value) {
      text += std::string(", \"") + name + "\": " + std::to_string(value);
    };
    text += text.size() > 1 ? ", {" : "{";
    text += std::string("\"kernel\": \"") + k.name + "\"";
    if (const char* wrong = check(p, {&k.plan})) {
      text += std::string(", \"reason\": \"") + wrong + "\"}";
      continue;
    }
    const int slices = divide_up(m.chunks(), c.chunks);
    put("images", c.images);
    put("rows", c.strips * k.plan.rows);
    put("columns", 2 * c.pairs);
    put("channels", c.chunks * kChunk < m.padded ? c.chunks * kChunk : m.padded);
    put("halo", k.plan.halo);
    put("sweep_rows", k.plan.rows);
    put("shared_bytes", k.plan.shared);
    put("blocks", static_cast<long long>(c.bands) * c.columns * divide_up(p.images, c.images) *
                      slices * k.gates);
    put("cluster", &k.plan == &of.single_pass ? c.bands * slices : 1);
    put("warp_instructions", static_cast<long long>(k.plan.cost));
    text += std::string(", \"chosen\": ") + (k.chosen ? "true" : "false");
    text += "}";
  }
  return text + "]";
}

}  // namespace casvit::cuda
