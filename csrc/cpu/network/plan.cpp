#include <stdexcept>
#include <string>

#include "cpu/network/layout.h"

namespace casvit {
namespace {

class Integers {
 public:
  Integers(const int64_t* from, int64_t count) : from_(from), left_(count) {}
  int64_t next(const char* name, int64_t least, int64_t most) {
    if (left_ == 0) throw std::invalid_argument("plan: ends before " + std::string(name));
    const int64_t value = *from_++;
    --left_;
    if (value < least || value > most)
      throw std::invalid_argument("plan: " + std::string(name) + ": expected " +
                                  std::to_string(least) + " to " + std::to_string(most) + ", got " +
                                  std::to_string(value));
    return value;
  }
  const int64_t* here() const { return from_; }
  int64_t left() const { return left_; }

 private:
  const int64_t* from_;
  int64_t left_;
};

// As many as MOST_SEGMENTS holds of the shortest vectors.
constexpr int64_t MOST_CHANNELS = MOST_SEGMENTS / 9 * 4, MOST_HIDDEN = MOST_SEGMENTS * 4;
constexpr int64_t MOST_BLOCKS = 1 << 12, MOST_CLASSES = 1 << 24;

}  // namespace

NetworkPlan read_plan(const int64_t* from, int64_t count) {
  Integers integers(from, count);
  NetworkPlan p{};
  p.in_chans = integers.next("in_chans", 1, MOST_CHANNELS);
  p.stem_mid = integers.next("stem_mid", 1, MOST_CHANNELS);
  p.normalized = integers.next("normalized", 0, 1) == 1;
  p.stages = integers.next("stages", 1, NetworkPlan::MOST_STAGES);
  for (int64_t s = 0; s < p.stages; ++s) {
    NetworkPlan::Stage& stage = p.stage[s];
    stage.C = integers.next("channels", 1, MOST_CHANNELS);
    stage.depth = integers.next("depth", 0, MOST_BLOCKS);
    stage.returned = integers.next("returned", 0, 1) == 1;
    stage.hidden = integers.here();
    for (int64_t i = 0; i < stage.depth; ++i) integers.next("hidden", 1, MOST_HIDDEN);
  }
  p.head = integers.next("head", NetworkPlan::NOTHING, NetworkPlan::LOGITS);
  const bool logits = p.head == NetworkPlan::LOGITS;
  p.classes = integers.next("classes", logits ? 1 : 0, logits ? MOST_CLASSES : 0);
  if (integers.left() > 0) throw std::invalid_argument("plan: longer than a plan");
  return p;
}

}  // namespace casvit
