// One threadgroup: some queries of one row and head attend over one part of its positions.
//
// Tile by tile, with a barrier between the steps:
//   score    each simdgroup multiplies the queries with the keys of its strips, over all of D;
//   soften   each simdgroup turns its rows of scores into weights (online softmax, Milakov and
//            Gimelshein 2018, arXiv:1805.02867): a peak and a total so far, and the factor by which
//            what was summed before shrinks;
//   weigh    each simdgroup adds the tile's weighted values, for its own blocks of D, in order of
//            position.
//
// Matrices are float32 on both sides: keys, queries and values are widened in registers, weights
// are never rounded. A lane of an 8x8 matrix holds elements (y, x) and (y, x + 1). Dimensions are
// dealt out so that a lane always reads whole runs of PER: a block of D is 8 runs, and matrix i of
// a block takes element i of each run.
//
// Queries are kept in threadgroup memory in the very order in which lanes want them. Where they
// take more than half of it (32 rows of 512 in 16 bits do), they are staged chunk by chunk for each
// tile: a fourth of the tile's keys and values in bytes, and out of a cache, where each simdgroup
// reading them for itself would be eight times that.

#include "attention_inputs.metal"
#include <metal_simdgroup_matrix>

constant constexpr int STRIP = 8;
constant constexpr int TILE = 64;
constant constexpr int PITCH = TILE + 8;   // of a row of scores: 8 rows lie in different banks
constant constexpr int MEMORY = 32768;     // bytes of a threadgroup
constant constexpr int STAGE = MEMORY / 2; // of them at most for queries

// Which simdgroup and lane this is, and the threadgroup's memory.
template <typename Run> struct Place {
  threadgroup Run* staged;   // queries
  threadgroup float* scores; // then weights
  threadgroup float2* stats; // of each row: the factor of this tile and the total so far
  uint simdgroup_index;
  uint lane_index;
};

// One threadgroup's work: TILES * 8 queries from `begin` on, over one part.
template <typename T, int D_, int TILES, int WINDOW, int RING, int THREADS> struct Attention {
  enum : int {
    D = D_,
    SIMDGROUPS = THREADS / 32,
    ROWS = TILES * 8,
    OWN_ROWS = (ROWS + SIMDGROUPS - 1) / SIMDGROUPS,
    STRIPS = (TILE / STRIP + SIMDGROUPS - 1) / SIMDGROUPS,
    PER = D % 32 ? 2 : 4,
    BLOCKS = D / (8 * PER),
    OWN_BLOCKS = (BLOCKS + SIMDGROUPS - 1) / SIMDGROUPS,
    BLOCK_BYTES = ROWS * 8 * PER * sizeof(T), // of the queries
    CHUNK = BLOCKS * BLOCK_BYTES > STAGE ? STAGE / BLOCK_BYTES : BLOCKS,
    STAGED = CHUNK * ROWS * 8, // runs
    SCORES = ROWS * PITCH,
    BUFFERS = CHUNK * BLOCK_BYTES + (2 * SCORES + 2 * ROWS) * 4 > MEMORY ? 1 : 2,
  };
  typedef vec<T, PER> Run;

  threadgroup Run* staged;   // STAGED
  threadgroup float* scores; // BUFFERS * SCORES
  threadgroup float2* stats; // ROWS
  int simdgroup;
  int lane;

  Queries<T> queries;
  Entries<T, RING> keys, values;
  Seen seen;
  int begin;
  simdgroup_float8x8 sums[TILES][OWN_BLOCKS][PER];
  float peaks[OWN_ROWS];
  float totals[OWN_ROWS];

  METAL_FUNC int y() const { return (lane >> 2 & 4) + (lane >> 1 & 3); }
  METAL_FUNC int x() const { return (lane >> 1 & 4) + (lane & 1) * 2; }

  METAL_FUNC void take(Inputs<T> inputs, Head of, uint group, Place<Run> place) {
    staged = place.staged;
    scores = place.scores;
    stats = place.stats;
    simdgroup = place.simdgroup_index;
    lane = place.lane_index;
    queries = inputs.queries_of(of);
    keys = inputs.template entries_of<RING>(of, inputs.keys, inputs.block_keys);
    values = inputs.template entries_of<RING>(of, inputs.values, inputs.block_values);
    seen = of.seen;
    begin = group * ROWS;
  }

  // Attend over positions [from, to], which lie in one part. All threads must take part.
  METAL_FUNC void attend(int from, int to) {
    clear();
    for (int tile = from / TILE; tile <= to / TILE; tile++) {
      if (CHUNK == BLOCKS && tile == from / TILE) {
        stage(0);
      }
      if (CHUNK == BLOCKS && (BUFFERS == 1 || tile == from / TILE)) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      const int start = tile * TILE;
      const int first = max(from - start, 0) / STRIP;
      const int end = (min(to - start, TILE - 1) + STRIP) / STRIP;
      threadgroup float* now = scores + tile % BUFFERS * SCORES;
      score(start, first, end, now);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      soften(start, now);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      weigh(start, first, end, now);
    }
  }

  // Write the sums, as they are or divided by the total, to [rows, D].
  template <typename U> METAL_FUNC void write_sums(device U* out, bool divided) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const int row = begin + 8 * t + y();
      const float total = divided ? stats[8 * t + y()].y : 1.0f;
#pragma unroll
      for (int u = 0; u < OWN_BLOCKS; u++) {
        const int block = simdgroup + u * SIMDGROUPS;
        if (block < BLOCKS && row < queries.rows) {
          device vec<U, PER>* to = (device vec<U, PER>*)(out + long(row) * D) + block * 8 + x();
          vec<U, PER> left, right;
#pragma unroll
          for (int i = 0; i < PER; i++) {
            left[i] = U(sums[t][u][i].thread_elements()[0] / total);
            right[i] = U(sums[t][u][i].thread_elements()[1] / total);
          }
          to[0] = left;
          to[1] = right;
        }
      }
    }
  }

  // Write each row's peak and total, to [rows].
  METAL_FUNC void write_stats(device float* to_peaks, device float* to_totals) const {
#pragma unroll
    for (int r = 0; r < OWN_ROWS; r++) {
      const int row = simdgroup + r * SIMDGROUPS;
      if (lane == 0 && row < ROWS && begin + row < queries.rows) {
        to_peaks[begin + row] = peaks[r];
        to_totals[begin + row] = totals[r];
      }
    }
  }

private:
  METAL_FUNC void clear() {
#pragma unroll
    for (int i = 0; i < TILES * OWN_BLOCKS * PER; i++) {
      sums[i / PER / OWN_BLOCKS][i / PER % OWN_BLOCKS][i % PER] =
          make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
#pragma unroll
    for (int r = 0; r < OWN_ROWS; r++) {
      peaks[r] = -INFINITY;
      totals[r] = 0.0f;
    }
  }

  METAL_FUNC static simdgroup_float8x8 pair(Run left, Run right, int i) {
    simdgroup_float8x8 matrix;
    matrix.thread_elements()[0] = float(left[i]);
    matrix.thread_elements()[1] = float(right[i]);
    return matrix;
  }

  // Copy CHUNK blocks of the queries, from `block` on, each lane what it will read.
  METAL_FUNC void stage(int block) {
    const int blocks = min(int(CHUNK), BLOCKS - block);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const device Run* from = (const device Run*)queries.at(begin + 8 * t + y()) + x();
      for (int i = simdgroup; i < blocks; i += SIMDGROUPS) {
        threadgroup Run* to = staged + ((i * TILES + t) * 32 + lane) * 2;
        to[0] = from[(block + i) * 8];
        to[1] = from[(block + i) * 8 + 1];
      }
    }
  }

  // Write the scores of this simdgroup's strips among [first, end) of the tile at `start`.
  METAL_FUNC void score(int start, int first, int end, threadgroup float* now) {
    simdgroup_float8x8 found[STRIPS][TILES];
#pragma unroll
    for (int i = 0; i < STRIPS * TILES; i++) {
      found[i / TILES][i % TILES] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    for (int block = 0; block < BLOCKS; block += CHUNK) {
      if (CHUNK < BLOCKS) {
        if (block > 0) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        stage(block);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
#pragma unroll
      for (int s = 0; s < STRIPS; s++) {
        const int strip = simdgroup + s * SIMDGROUPS;
        if (first <= strip && strip < end) {
          add_products(start + strip * STRIP, block, found[s]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < STRIPS * TILES; i++) {
      const int strip = simdgroup + i / TILES * SIMDGROUPS;
      if (first <= strip && strip < end) {
        threadgroup float* to = now + (i % TILES * 8 + y()) * PITCH + strip * STRIP + x();
        to[0] = found[i / TILES][i % TILES].thread_elements()[0];
        to[1] = found[i / TILES][i % TILES].thread_elements()[1];
      }
    }
  }

  // Add the products of the staged queries and the keys of a strip at `position`.
  METAL_FUNC void
  add_products(int position, int block, thread simdgroup_float8x8 (&found)[TILES]) {
    const device Run* left = (const device Run*)keys.at(position + x(), seen) + y();
    const device Run* right = (const device Run*)keys.at(position + x() + 1, seen) + y();
    const int blocks = min(int(CHUNK), BLOCKS - block);
#pragma unroll(2)
    for (int b = 0; b < blocks; b++) {
      const Run left_key = left[(block + b) * 8], right_key = right[(block + b) * 8];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const threadgroup Run* query = staged + ((b * TILES + t) * 32 + lane) * 2;
        const Run left_query = query[0], right_query = query[1];
#pragma unroll
        for (int i = 0; i < PER; i++) {
          simdgroup_multiply_accumulate(
              found[t], pair(left_query, right_query, i), pair(left_key, right_key, i), found[t]);
        }
      }
    }
  }

  // Turn the scores of this simdgroup's rows into weights.
  METAL_FUNC void soften(int start, threadgroup float* now) {
    const bool all = start + TILE - 1 <= seen.own && (!WINDOW || start > seen.last - WINDOW);
#pragma unroll
    for (int r = 0; r < OWN_ROWS; r++) {
      const int row = simdgroup + r * SIMDGROUPS;
      if (row < ROWS) {
        threadgroup float* mine = now + row * PITCH + lane;
        const int last = seen.own + queries.position(begin + row) - start;
        const bool left = all || sees(last, lane), right = all || sees(last, lane + 32);
        const float left_score = left ? mine[0] : -INFINITY;
        const float right_score = right ? mine[32] : -INFINITY;
        const float peak = max(peaks[r], simd_max(max(left_score, right_score)));
        const float factor = peak == peaks[r] ? 1.0f : exp(peaks[r] - peak);
        const float left_weight = left ? exp(left_score - peak) : 0.0f;
        const float right_weight = right ? exp(right_score - peak) : 0.0f;
        peaks[r] = peak;
        totals[r] = fma(totals[r], factor, simd_sum(left_weight + right_weight));
        mine[0] = left_weight;
        mine[32] = right_weight;
        if (lane == 0) {
          stats[row] = float2(factor, totals[r]);
        }
      }
    }
  }

  METAL_FUNC static bool sees(int last, int position) {
    return position <= last && (!WINDOW || position > last - WINDOW);
  }

  // Add the weighted values of strips [first, end), in order of position.
  METAL_FUNC void weigh(int start, int first, int end, const threadgroup float* now) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const float factor = stats[8 * t + y()].x;
#pragma unroll
      for (int i = 0; i < OWN_BLOCKS * PER; i++) {
        sums[t][i / PER][i % PER].thread_elements()[0] *= factor;
        sums[t][i / PER][i % PER].thread_elements()[1] *= factor;
      }
    }
#pragma unroll(2)
    for (int strip = first; strip < end; strip++) {
      const device Run* value =
          (const device Run*)values.at(start + strip * STRIP + y(), seen) + x();
      simdgroup_float8x8 weights[TILES];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const threadgroup float* from = now + (8 * t + y()) * PITCH + strip * STRIP + x();
        weights[t].thread_elements()[0] = from[0];
        weights[t].thread_elements()[1] = from[1];
      }
#pragma unroll
      for (int u = 0; u < OWN_BLOCKS; u++) {
        const int block = simdgroup + u * SIMDGROUPS;
        if (block < BLOCKS) {
          const Run left = value[block * 8], right = value[block * 8 + 1];
#pragma unroll
          for (int i = 0; i < PER; i++) {
            const simdgroup_float8x8 columns = pair(left, right, i);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
              simdgroup_multiply_accumulate(
                  sums[t][u][i], weights[t], columns, sums[t][u][i]);
            }
          }
        }
      }
    }
  }
};
