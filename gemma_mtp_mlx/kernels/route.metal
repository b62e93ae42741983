// Choosing each token's experts: norm, router projection, the best TOP and their weights.
//
// A threadgroup is a token and sees no other. A simdgroup scores 8 experts at a time, its lanes side by
// side along their weight rows; the router's weights are few, so that every token reads them matters
// less than another launch would. Rounded to T is what the operations round: the norm before and
// after its weight, and the scores, which therefore are equal at times.

#include "weights.metal"

// normed = rms norm of x, times scale / sqrt(k); rounded to T where the operations round.
template <uint THREADS, typename T, typename S>
METAL_FUNC void norm_for_router(
    const device T* x, S scale, float eps, uint k, threadgroup vec<T, 4>* normed,
    threadgroup float* squares, uint simdgroup, uint lane) {
  float square = 0.0f;
  for (uint i = simdgroup * 32 + lane; i < k; i += THREADS) {
    square = fma(float(x[i]), float(x[i]), square);
  }
  square = simd_sum(square);
  if (lane == 0) {
    squares[simdgroup] = square;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint i = 0; i < THREADS / 32; i++) {
    total += squares[i];
  }
  const float inverse = precise::rsqrt(total / float(k) + eps);
  const float root = float(T(precise::rsqrt(float(k))));
  for (uint i = simdgroup * 32 + lane; i < k / 4; i += THREADS) {
    vec<T, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const T unit = T(float(x[4 * i + j]) * inverse);
      four[j] = T(float(unit) * float(T(float(scale[4 * i + j]) * root)));
    }
    normed[i] = four;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// scores[e] = W's row e times x, rounded to T. A multiple of 8 rows.
template <uint THREADS, typename M, typename T>
METAL_FUNC void score_experts(
    M m, const threadgroup vec<T, 4>* x, threadgroup float* scores, uint simdgroup, uint lane) {
  constexpr int ROWS = 8; // at a time: loads to wait for together
  for (uint first = simdgroup * ROWS; first < m.n; first += THREADS / 32 * ROWS) {
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      sums[r] = 0.0f;
    }
    for (uint k = lane * M::RUN; k < m.k; k += 32 * M::RUN) {
      Run<M> runs[ROWS];
      Scale scales[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        runs[r].load(m, first + r, k);
        scales[r] = m.scale(first + r, k);
      }
#pragma unroll
      for (int i = 0; i < M::RUN; i++) {
        const float value = float(x[(k + i) / 4][i % 4]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          sums[r] = fma(runs[r].weight(i, scales[r]), value, sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = simd_sum(sums[r]);
      if (lane == uint(r)) {
        scores[first + r] = float(T(sum));
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Ascends as the score does; every score has one, so ranks are a permutation whatever they are.
METAL_FUNC uint rank_key(float score) {
  const uint bits = as_type<uint>(score + 0.0f); // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// best[i]: the expert of the i-th highest score, of equal ones the lowest number first.
template <uint THREADS, uint TOP>
METAL_FUNC void best_experts(
    const threadgroup float* scores, uint experts, threadgroup uint* best, uint thread_index) {
  for (uint e = thread_index; e < experts; e += THREADS) {
    const uint key = rank_key(scores[e]);
    uint rank = 0;
    for (uint other = 0; other < experts; other++) {
      const uint its = rank_key(scores[other]);
      rank += its > key || (its == key && other < e) ? 1 : 0;
    }
    if (rank < TOP) {
      best[rank] = e;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// One token. chosen, factors: its TOP experts, best first, and softmax over their scores times
// expert_scale. x: its row; normed [k / 4], scores [experts], best [TOP], squares [SIMDGROUPS].
template <uint THREADS, uint TOP, typename T, typename S, typename E, typename M>
METAL_FUNC void route(
    const device T* x, S scale, M proj, E expert_scale, float eps, device int* chosen,
    device float* factors, threadgroup vec<T, 4>* normed, threadgroup float* scores,
    threadgroup uint* best, threadgroup float* squares, uint simdgroup, uint lane) {
  norm_for_router<THREADS>(x, scale, eps, proj.k, normed, squares, simdgroup, lane);
  score_experts<THREADS>(proj, normed, scores, simdgroup, lane);
  best_experts<THREADS, TOP>(scores, proj.n, best, simdgroup * 32 + lane);
  if (simdgroup > 0) {
    return;
  }
  const uint expert = best[min(lane, TOP - 1)];
  const float part = lane < TOP ? precise::exp(scores[expert] - scores[best[0]]) : 0.0f;
  const float total = simd_sum(part);
  if (lane < TOP) {
    chosen[lane] = int(expert);
    factors[lane] = part / total * float(expert_scale[expert]);
  }
}
