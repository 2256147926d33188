// Generalised advantage estimation over packed rows: the parameters, shared by the CPU and the CUDA implementation.
//
// For the tokens of one row, walked from the last to the first, with g = gamma, l = lambda, n = A = 0 after the end:
//   counted token (mask != 0):  A = (r + g n - v) + g l A;  n = v
//   other token:                A and n are carried through unchanged
//   advantages = A;  returns = A + v
// One step is an affine map of the state (n, A), and affine maps compose associatively; AffineMap is that algebra, so
// that a parallel scan and the plain loop compute the same thing.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define HYBRIDRL_HD __host__ __device__ __forceinline__
#else
#define HYBRIDRL_HD inline
#endif

namespace hybridrl {

// Row boundaries [rows + 1], int32 or int64. Trusted: the caller has checked that they ascend from 0 to tokens.
struct Offsets {
  const void* data;
  bool wide;  // int64 instead of int32
  HYBRIDRL_HD int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct GaeArgs {
  const float* rewards;  // [tokens]
  const float* values;   // [tokens]
  const float* mask;     // [tokens]
  Offsets rows_begin;    // [rows + 1]
  float* advantages;     // [tokens], out
  float* returns;        // [tokens], out
  int64_t rows;
  int64_t tokens;
  float gamma;
  float lam;
};

// (n, A) -> (s n + u, a A + c n + b)
struct AffineMap {
  float s, u, a, c, b;

  static HYBRIDRL_HD AffineMap identity() { return {1.f, 0.f, 1.f, 0.f, 0.f}; }

  static HYBRIDRL_HD AffineMap step(float reward, float value, float mask, float gamma, float lam) {
    // A choice, not arithmetic with the mask: garbage (NaN) at a token that does not count must not spread.
    return mask != 0.f ? AffineMap{0.f, value, gamma * lam, gamma, reward - value} : identity();
  }

  // `later` acts on what `first` returned; in a reverse scan `first` holds the tokens further to the right.
  static HYBRIDRL_HD AffineMap compose(const AffineMap& later, const AffineMap& first) {
    return {later.s * first.s, later.s * first.u + later.u, later.a * first.a, later.a * first.c + later.c * first.s,
            later.a * first.b + later.c * first.u + later.b};
  }
};

// threads: how many CPU threads to use at most. The result does not depend on it.
void gae_cpu(const GaeArgs& args, int threads);

// Pointers are device memory of the current device; stream is a cudaStream_t. Returns nullptr, or CUDA's error text.
const char* gae_cuda(const GaeArgs& args, void* stream);

}  // namespace hybridrl
