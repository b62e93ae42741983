// A mixture of experts over the few positions of a pass: gate_up and down, a launch each.
//
// A pair is one of the TOP choices of a token: pair token * TOP + i is the token's i-th choice. No
// launch groups the pairs by expert: every threadgroup of gate_up and down notes in threadgroup
// memory who chose whom, which is a few hundred numbers, and finds the pairs of its experts there.
// An expert's pairs are taken 16, 8 or up to 4 at a time; weights.metal makes the sums the same
// whichever it is, so a token's result does not depend on who shares its experts.
//
// gate_up: a threadgroup per expert in use and 8 weight rows of gate and of up per simdgroup. Up to 4
// pairs, a simdgroup works alone on its rows; more, all work on the same 8 rows, on their chains.
// down: a threadgroup per 8 weight rows. Its simdgroups take the experts in use in turns, each one
// alone and all 8 chains itself: an expert's rows are so short that sharing them would be waiting.
// Pairs meet in threadgroup memory only, where each token adds its own in the order of its choices.

#include "weights.metal"
#include "geglu.metal"

constant constexpr uint TOKENS = 64; // of a threadgroup: a bit each, and TOP * 8 sums in down
constant constexpr uint WORD = 32;   // tokens

// ---- who chose whom ----------------------------------------------------------------------------

// Afterwards bit t % 32 of users[2 * e + t / 32] says whether token t chose expert e.
template <uint THREADS, uint TOP, typename Ints>
METAL_FUNC void note_users(
    Ints chosen, uint tokens, uint experts, threadgroup atomic_uint* users, uint thread_index) {
  for (uint i = thread_index; i < 2 * experts; i += THREADS) {
    atomic_store_explicit(users + i, 0u, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint pair = thread_index; pair < tokens * TOP; pair += THREADS) {
    const uint token = pair / TOP, word = 2 * uint(chosen[pair]) + token / WORD;
    atomic_fetch_or_explicit(users + word, 1u << token % WORD, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

METAL_FUNC uint users_of(threadgroup atomic_uint* users, uint expert, uint word) {
  return atomic_load_explicit(users + 2 * expert + word, memory_order_relaxed);
}

// The n-th expert in use, by number; `experts` if there are no more than n. The same in all lanes.
METAL_FUNC uint
nth_expert(threadgroup atomic_uint* users, uint experts, uint n, uint lane) {
  for (uint first = 0; first < experts; first += 32) {
    const uint expert = min(first + lane, experts - 1);
    const bool used = first + lane < experts &&
        (users_of(users, expert, 0) | users_of(users, expert, 1)) != 0;
    uint found = uint(simd_vote::vote_t(simd_ballot(used)));
    const uint count = popcount(found);
    if (n < count) {
      for (; n > 0; n--) {
        found &= found - 1;
      }
      return first + ctz(found);
    }
    n -= count;
  }
  return experts;
}

// Write an expert's pairs in ascending order, for the lanes of this simdgroup. Returns their number.
template <uint TOP, typename Ints>
METAL_FUNC uint list_pairs(
    Ints chosen, threadgroup atomic_uint* users, uint expert, threadgroup ushort* pairs,
    uint lane) {
  uint count = 0;
  for (uint word = 0; word < TOKENS / WORD; word++) {
    const uint bits = users_of(users, expert, word);
    if (bits >> lane & 1) {
      uint pair = (word * WORD + lane) * TOP;
      while (uint(chosen[pair]) != expert) {
        pair++;
      }
      pairs[count + popcount(bits & ((1u << lane) - 1))] = ushort(pair);
    }
    count += popcount(bits);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return count;
}

// ---- gate and up -------------------------------------------------------------------------------

// h of up to COLUMNS pairs at weight rows first_row to first_row + 7. All lanes of a simdgroup.
template <uint TOP, int ROWS, int COLUMNS, typename T, typename M>
METAL_FUNC void gate_up_rows(
    const device T* x, thread const M (&matrices)[2], uint first_row,
    const threadgroup ushort* pairs, uint count, device T* h, uint lane) {
  const device T* columns[COLUMNS]; // past the end: the last again, not stored
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    columns[c] = x + size_t(pairs[min(uint(c), count - 1)] / TOP) * matrices[0].k;
  }
  for (uint row = first_row + lane / CHAINS; row < first_row + 8; row += 4 * ROWS) {
    uint rows[2 * ROWS];
#pragma unroll
    for (int i = 0; i < 2 * ROWS; i++) {
      rows[i] = row + i % ROWS * 4;
    }
    float sums[2 * ROWS][COLUMNS];
    multiply_rows<M, 2, 2 * ROWS, COLUMNS, T>(matrices, rows, columns, lane % CHAINS, sums);
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i++) {
      const int r = i / COLUMNS, c = i % COLUMNS;
      if (lane % CHAINS == uint(i % CHAINS) && uint(c) < count) {
        h[size_t(pairs[c]) * matrices[0].n + rows[r]] = geglu(T(sums[r][c]), T(sums[ROWS + r][c]));
      }
    }
  }
}

// The same for up to 8 * COLUMN_TILES pairs, by all threads of the threadgroup.
template <uint SIMDGROUPS, uint TOP, int COLUMN_TILES, typename T, typename M>
METAL_FUNC void gate_up_tile(
    const device T* x, thread const M (&matrices)[2], uint first_row,
    const threadgroup ushort* pairs, uint count, device T* h, threadgroup float* chains,
    uint simdgroup, uint lane) {
  const device T* columns[2 * COLUMN_TILES];
#pragma unroll
  for (int i = 0; i < 2 * COLUMN_TILES; i++) {
    const uint column = min(uint(i / 2 * 8 + i % 2) + tile_column(lane), count - 1);
    columns[i] = x + size_t(pairs[column] / TOP) * matrices[0].k;
  }
  const uint rows[2] = {first_row + tile_row(lane), first_row + tile_row(lane)};
  threadgroup_barrier(mem_flags::mem_threadgroup); // chains may still be read
  multiply_tiles<SIMDGROUPS, M, 2, 2, COLUMN_TILES, T>(
      matrices, rows, columns, simdgroup, lane, chains);
  for (uint i = simdgroup * 32 + lane; i < 8 * count; i += SIMDGROUPS * 32) {
    const uint row = i % 8, column = i / 8;
    const T gate = T(total<2, COLUMN_TILES>(chains, 0, row, column));
    const T up = T(total<2, COLUMN_TILES>(chains, 1, row, column));
    h[size_t(pairs[column]) * matrices[0].n + first_row + row] = geglu(gate, up);
  }
}

// Threadgroup (rows, n-th expert in use, tile of TOKENS); up to FEW pairs by plain fma.
// x: [count, k]; chosen: [count, TOP];
// h: [count * TOP, n]. users [2 * experts]; pairs [SIMDGROUPS * TOKENS]; chains [CHAINS * 4 * 64].
template <uint SIMDGROUPS, uint TOP, int ROWS, uint FEW, typename T, typename M, typename Ints>
METAL_FUNC void gate_up(
    const device T* x, Ints chosen, uint count, M gate, M up, uint experts, device T* h,
    threadgroup atomic_uint* users, threadgroup ushort* pairs, threadgroup float* chains,
    uint3 group, uint simdgroup, uint lane) {
  const uint first_token = group.z * TOKENS, tokens = min(TOKENS, count - first_token);
  x += size_t(first_token) * gate.k;
  chosen += first_token * TOP;
  h += size_t(first_token) * TOP * gate.n;
  note_users<SIMDGROUPS * 32, TOP>(chosen, tokens, experts, users, simdgroup * 32 + lane);
  const uint expert = nth_expert(users, experts, group.y, lane);
  if (expert == experts) {
    return;
  }
  const M m[2] = {gate.at(expert), up.at(expert)};
  pairs += simdgroup * TOKENS;
  const uint all = list_pairs<TOP>(chosen, users, expert, pairs, lane);
  const uint left = all % 16 > FEW ? 0 : all % 16, tiled = all - left;
  const uint begin = group.x * SIMDGROUPS * 8, end = min(begin + SIMDGROUPS * 8, gate.n);
  const uint own = begin + simdgroup * 8;
  for (uint row = begin; tiled > 0 && row < end; row += 8) {
    for (uint done = 0; done < tiled; done += 16) {
      const threadgroup ushort* p = pairs + done;
      const uint taken = min(tiled - done, 16u);
      if (taken > 8) {
        gate_up_tile<SIMDGROUPS, TOP, 2>(x, m, row, p, taken, h, chains, simdgroup, lane);
      } else {
        gate_up_tile<SIMDGROUPS, TOP, 1>(x, m, row, p, taken, h, chains, simdgroup, lane);
      }
    }
  }
  if (left == 0 || own >= end) {
    return;
  }
  pairs += tiled;
  if (left == 1) {
    gate_up_rows<TOP, ROWS, 1>(x, m, own, pairs, left, h, lane);
  } else if (left == 2) {
    gate_up_rows<TOP, ROWS, 2>(x, m, own, pairs, left, h, lane);
  } else {
    gate_up_rows<TOP, 1, 4>(x, m, own, pairs, left, h, lane); // more would not fit its registers
  }
}

// ---- down --------------------------------------------------------------------------------------

// sums [pairs, 8]: weight rows first_row to first_row + 7 times h of up to COLUMNS pairs.
template <int ROWS, int COLUMNS, typename T, typename M>
METAL_FUNC void down_rows(
    const device T* h, M m, uint first_row, const threadgroup ushort* pairs, uint count,
    threadgroup float* sums, uint lane) {
  const M matrices[1] = {m};
  const device T* columns[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    columns[c] = h + size_t(pairs[min(uint(c), count - 1)]) * m.k;
  }
  for (uint row = lane / CHAINS; row < 8; row += 4 * ROWS) {
    uint rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      rows[r] = first_row + row + r * 4;
    }
    float all[ROWS][COLUMNS];
    multiply_rows<M, 1, ROWS, COLUMNS, T>(matrices, rows, columns, lane % CHAINS, all);
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i++) {
      const int r = i / COLUMNS, c = i % COLUMNS;
      if (lane % CHAINS == uint(i % CHAINS) && uint(c) < count) {
        sums[pairs[c] * 8 + row + r * 4] = all[r][c];
      }
    }
  }
}

// One unit of weight row `row` times 8 columns per tile; add_chain of weights.metal takes all units
// of a chain, which are far apart, where this simdgroup passes through the row once.
template <typename M, int COLUMN_TILES, typename T>
METAL_FUNC void add_unit(
    M m, uint row, const device T* const thread (&columns)[2 * COLUMN_TILES], uint unit, uint lane,
    thread simdgroup_float8x8 (&sums)[COLUMN_TILES]) {
  const uint j = tile_row(lane), k = unit * M::UNIT, own = k + tile_column(lane) / 2 * M::RUN;
  const uint first = k + j / 2 * M::RUN + j % 2 * 2;
  Run<M> run;
  run.load(m, row, own);
  const Scale scale = m.scale(row, own);
#pragma unroll
  for (int b = 0; b < M::RUN / 4; b++) {
    vec<T, 2> x[2 * COLUMN_TILES];
#pragma unroll
    for (int c = 0; c < 2 * COLUMN_TILES; c++) {
      x[c] = *(const device vec<T, 2>*)(columns[c] + first + 4 * b);
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
      simdgroup_float8x8 decoded;
      decoded.thread_elements()[0] = run.weight(4 * b + t, scale);
      decoded.thread_elements()[1] = run.weight(4 * b + 2 + t, scale);
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) {
        simdgroup_float8x8 activations;
        activations.thread_elements()[0] = float(x[2 * c][t]);
        activations.thread_elements()[1] = float(x[2 * c + 1][t]);
        simdgroup_multiply_accumulate(sums[c], decoded, activations, sums[c]);
      }
    }
  }
}

// The same as down_rows for up to 8 * COLUMN_TILES pairs.
template <int COLUMN_TILES, typename T, typename M>
METAL_FUNC void down_tile(
    const device T* h, M m, uint first_row, const threadgroup ushort* pairs, uint count,
    threadgroup float* sums, uint lane) {
  const device T* columns[2 * COLUMN_TILES];
#pragma unroll
  for (int i = 0; i < 2 * COLUMN_TILES; i++) {
    const uint column = min(uint(i / 2 * 8 + i % 2) + tile_column(lane), count - 1);
    columns[i] = h + size_t(pairs[column]) * m.k;
  }
  simdgroup_float8x8 chains[CHAINS][COLUMN_TILES];
#pragma unroll
  for (int i = 0; i < CHAINS * COLUMN_TILES; i++) {
    chains[i / COLUMN_TILES][i % COLUMN_TILES] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  const uint units = m.k / M::UNIT, row = first_row + tile_row(lane);
  for (uint first = 0; first < units; first += CHAINS) {
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) {
      if (first + chain < units) {
        add_unit<M, COLUMN_TILES, T>(m, row, columns, first + chain, lane, chains[chain]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * COLUMN_TILES; i++) {
    float s[CHAINS];
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) {
      s[chain] = chains[chain][i / 2].thread_elements()[i % 2];
    }
    const uint column = uint(i / 2 * 8 + i % 2) + tile_column(lane);
    if (column < count) {
      sums[pairs[column] * 8 + tile_row(lane)] =
          ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    }
  }
}

// Threadgroup (8 rows, -, tile of TOKENS). h: [count * TOP, k]; chosen, factors: [count, TOP];
// y: [count, n]. users [2 * experts]; pairs [SIMDGROUPS * TOKENS]; sums [TOKENS * TOP * 8].
template <
    uint SIMDGROUPS, uint TOP, int ROWS, uint FEW, typename T, typename M, typename Ints,
    typename Floats>
METAL_FUNC void down(
    const device T* h, Ints chosen, Floats factors, uint count, M proj, uint experts,
    device T* y, threadgroup atomic_uint* users, threadgroup ushort* pairs,
    threadgroup float* sums, uint3 group, uint simdgroup, uint lane) {
  const uint first_token = group.z * TOKENS, tokens = min(TOKENS, count - first_token);
  const uint first_row = group.x * 8, thread_index = simdgroup * 32 + lane;
  h += size_t(first_token) * TOP * proj.k;
  chosen += first_token * TOP;
  factors += first_token * TOP;
  y += size_t(first_token) * proj.n;
  note_users<SIMDGROUPS * 32, TOP>(chosen, tokens, experts, users, thread_index);
  pairs += simdgroup * TOKENS;
  for (uint n = simdgroup;; n += SIMDGROUPS) {
    const uint expert = nth_expert(users, experts, n, lane);
    if (expert == experts) {
      break;
    }
    const M m = proj.at(expert);
    simdgroup_barrier(mem_flags::mem_threadgroup); // pairs may still be read
    uint left = list_pairs<TOP>(chosen, users, expert, pairs, lane);
    for (const threadgroup ushort* p = pairs; left > 0; left -= min(left, 16u), p += 16) {
      if (left > 8) {
        down_tile<2>(h, m, first_row, p, min(left, 16u), sums, lane);
      } else if (left > FEW) {
        down_tile<1>(h, m, first_row, p, left, sums, lane);
      } else if (left > 2) {
        down_rows<ROWS, 4>(h, m, first_row, p, left, sums, lane);
      } else if (left == 2) {
        down_rows<ROWS, 2>(h, m, first_row, p, left, sums, lane);
      } else {
        down_rows<ROWS, 1>(h, m, first_row, p, left, sums, lane);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < tokens * 8; i += SIMDGROUPS * 32) {
    const uint token = i / 8, row = i % 8;
    float sum = 0.0f;
#pragma unroll
    for (uint j = 0; j < TOP; j++) {
      sum = fma(float(factors[token * TOP + j]), sums[(token * TOP + j) * 8 + row], sum);
    }
    y[size_t(token) * proj.n + first_row + row] = T(sum);
  }
}
