// Splits the rows of a packed batch over threads, evenly by tokens. Threads are made and joined in the call: a pool
// would not survive the fork() of a data or reward worker.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace hybridrl {

// Calls body(first_row, last_row) so that each row is visited exactly once. begin(i) is the first token of row i.
template <class Begin, class Body>
void for_rows(int64_t rows, int64_t tokens, int threads, const Begin& begin, const Body& body) {
  constexpr int64_t kTokensPerThread = 1 << 15;  // starting a thread costs about as much as this many tokens
  const int64_t wanted = std::min<int64_t>({std::max(threads, 1), rows, tokens / kTokensPerThread + 1});
  if (wanted <= 1) return body(int64_t{0}, rows);
  std::vector<std::thread> others;
  int64_t first = 0;
  for (int64_t k = 1; k <= wanted; ++k) {
    int64_t last = first;
    if (k == wanted) last = rows;
    while (last < rows && begin(last) < tokens * k / wanted) ++last;
    if (k == wanted) body(first, last);
    else if (last > first) others.emplace_back(body, first, last);
    first = last;
  }
  for (auto& t : others) t.join();
}

}  // namespace hybridrl
