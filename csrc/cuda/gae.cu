// GAE on the GPU: one block a row, walking tiles of the row from its end; inside a tile a reverse scan of affine maps.
//
// Every token's result is composed in an order that depends on the row alone (its length and the token's place in it),
// so the numbers are equal run to run and do not depend on which other rows share the batch.
#include <cuda_runtime.h>

#include "gae.h"

namespace hybridrl {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 4;  // tokens a thread
constexpr int kTile = kThreads * kItems;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ AffineMap shuffle_down(const AffineMap& m, int delta) {
  constexpr unsigned kAll = 0xffffffffu;
  return {__shfl_down_sync(kAll, m.s, delta), __shfl_down_sync(kAll, m.u, delta), __shfl_down_sync(kAll, m.a, delta),
          __shfl_down_sync(kAll, m.c, delta), __shfl_down_sync(kAll, m.b, delta)};
}

// What the maps of all threads with a larger index do together (the identity for the last thread). `total` receives
// the composition of the whole block, in every thread.
__device__ AffineMap scan_from_right(const AffineMap& own, AffineMap* of_warp, AffineMap* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  AffineMap inclusive = own;
  for (int delta = 1; delta < 32; delta *= 2) {
    const AffineMap right = shuffle_down(inclusive, delta);
    if (lane + delta < 32) inclusive = AffineMap::compose(inclusive, right);
  }
  AffineMap exclusive = shuffle_down(inclusive, 1);
  if (lane == 31) exclusive = AffineMap::identity();
  if (lane == 0) of_warp[warp] = inclusive;
  __syncthreads();
  AffineMap right_warps = AffineMap::identity(), all = AffineMap::identity();
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w == warp) right_warps = all;
    all = AffineMap::compose(of_warp[w], all);
  }
  __syncthreads();  // of_warp is written again for the next tile
  *total = all;
  return AffineMap::compose(exclusive, right_warps);
}

__global__ void __launch_bounds__(kThreads) gae_kernel(GaeArgs p) {
  __shared__ AffineMap of_warp[kWarps];
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int64_t begin = p.rows_begin.at(row), end = p.rows_begin.at(row + 1);
    float tile_n = 0.f, tile_a = 0.f;  // the state to the right of the tile
    for (int64_t right = end; right > begin; right -= kTile) {
      // The tile is [right - kTile, right); places left of the row's begin are identities.
      const int64_t first = right - kTile + threadIdx.x * kItems;
      AffineMap maps[kItems], own = AffineMap::identity();
      float values[kItems];
      for (int i = kItems - 1; i >= 0; --i) {
        const int64_t t = first + i;
        const bool inside = t >= begin;
        values[i] = inside ? p.values[t] : 0.f;
        maps[i] = inside ? AffineMap::step(p.rewards[t], values[i], p.mask[t], p.gamma, p.lam) : AffineMap::identity();
        own = AffineMap::compose(maps[i], own);
      }
      AffineMap total;
      const AffineMap before = scan_from_right(own, of_warp, &total);
      float n = before.s * tile_n + before.u;
      float a = before.a * tile_a + before.c * tile_n + before.b;
      for (int i = kItems - 1; i >= 0; --i) {
        const float next_a = maps[i].a * a + maps[i].c * n + maps[i].b;
        n = maps[i].s * n + maps[i].u;
        a = next_a;
        const int64_t t = first + i;
        if (t >= begin) {
          p.advantages[t] = a;
          p.returns[t] = a + values[i];
        }
      }
      const float tile_next_a = total.a * tile_a + total.c * tile_n + total.b;
      tile_n = total.s * tile_n + total.u;
      tile_a = tile_next_a;
    }
  }
}

}  // namespace

const char* gae_cuda(const GaeArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  constexpr int64_t kMaxBlocks = 1 << 20;
  const int blocks = static_cast<int>(args.rows < kMaxBlocks ? args.rows : kMaxBlocks);
  gae_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hybridrl
