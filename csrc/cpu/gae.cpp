// GAE on the CPU: the recurrence itself, rows shared out over threads.
#include "gae.h"

#include "parallel.h"

namespace hybridrl {

void gae_cpu(const GaeArgs& p, int threads) {
  const float decay = p.gamma * p.lam;
  const auto begin = [&](int64_t row) { return p.rows_begin.at(row); };
  for_rows(p.rows, p.tokens, threads, begin, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float next_value = 0.f, advantage = 0.f;
      for (int64_t t = begin(row + 1) - 1; t >= begin(row); --t) {
        const float value = p.values[t];
        if (p.mask[t] != 0.f) {
          advantage = (p.rewards[t] + p.gamma * next_value - value) + decay * advantage;
          next_value = value;
        }
        p.advantages[t] = advantage;
        p.returns[t] = advantage + value;
      }
    }
  });
}

}  // namespace hybridrl
