// Weights in MLX's formats, and the one order in which they meet activations.
//
// Every product y[m][n] = sum over k of x[m][k] * W[n][k] is made of the same operations in the same
// order, whatever computes it and however many rows m there are:
//   - a row is cut into units of 4 runs of RUN weights (RUN is 16, or 8 where K % 64 != 0);
//   - unit u belongs to chain u % 8, and a chain takes its units in ascending order;
//   - within a unit, step (b, t) takes the 8 weights RUN * c + 4 * b + 2 * p + t, c = 0..3, p = 0..1,
//     in the order of 2 * c + p; steps ascend, t = 0..1 innermost;
//   - each weight is decoded to float32 and added as chain = fma(weight, x, chain), from 0;
//   - y is the tree ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) of the chains.
// A step is one simdgroup_multiply_accumulate: 8 weight rows x 8 k times 8 k x 8 columns (a column is
// a position, a row of x). So the matrix unit and plain fma give the same bits.
//
// Why this order: a lane of an 8x8 matrix holds elements (row, 2c) and (row, 2c + 1), so c selects a
// run: the lane of A reads its RUN weights as one wide load and decodes them where they are needed,
// and nothing is staged in threadgroup memory. The two steps t make the activations of B pairs, one
// load each; and 16 activations per column are all that plain fma must hold at a time.
// Why weights are decoded with scale and bias (one fma each) and not factored out of the group's sum:
// that takes sums of x, which cost more than the fma until a lane has 4 rows, and it ties the order
// to the group. This way the order is the same for every format.
//
// The idea of decoding weights into the registers of the A operand is that of mlx-dspark's skinny
// matmul and of MLX's pull request 4265; orders and layouts here are our own.

#include <metal_simdgroup_matrix>

#include "formats.metal"

constant constexpr int CHAINS = 8;

// ---- many columns: the matrix unit -------------------------------------------------------------

// The elements a lane holds of an 8x8 matrix: (tile_row, tile_column) and (tile_row, tile_column + 1).
METAL_FUNC uint tile_row(uint lane) { return (lane >> 2 & 4) + (lane >> 1 & 3); }
METAL_FUNC uint tile_column(uint lane) { return (lane >> 1 & 4) + (lane & 1) * 2; }

// Add one chain: sums[tile][c] += W's 8 rows of the tile times 8 columns.
// rows: this lane's, row tile_row(lane) of each tile. Tiles are spread over the matrices evenly.
// columns: where this lane's columns start in x; 2i and 2i + 1 are tile_column(lane) of column tile i
// and the one after it.
template <typename M, int MATRICES, int TILES, int COLUMN_TILES, typename T>
METAL_FUNC void add_chain(
    thread const M (&matrices)[MATRICES], thread const uint (&rows)[TILES],
    const device T* const thread (&columns)[2 * COLUMN_TILES], uint chain, uint lane,
    thread simdgroup_float8x8 (&sums)[TILES][COLUMN_TILES]) {
  constexpr int PAIRS = M::RUN / 4;
  const uint run = tile_column(lane) / 2 * M::RUN;
  const uint j = tile_row(lane);
  const uint first = j / 2 * M::RUN + j % 2 * 2;
  for (uint unit = chain; unit < matrices[0].k / M::UNIT; unit += CHAINS) {
    const uint k = unit * M::UNIT;
    Run<M> runs[TILES];
    Scale scales[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      thread const M& m = matrices[i * MATRICES / TILES];
      runs[i].load(m, rows[i], k + run);
      scales[i] = m.scale(rows[i], k + run);
    }
    vec<T, 2> x[2 * COLUMN_TILES][PAIRS];
#pragma unroll
    for (int c = 0; c < 2 * COLUMN_TILES; c++) {
#pragma unroll
      for (int b = 0; b < PAIRS; b++) {
        x[c][b] = *(const device vec<T, 2>*)(columns[c] + k + first + 4 * b);
      }
    }
#pragma unroll
    for (int step = 0; step < 2 * PAIRS; step++) {
      const int b = step / 2, t = step % 2;
      simdgroup_float8x8 activations[COLUMN_TILES];
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) {
        activations[c].thread_elements()[0] = float(x[2 * c][b][t]);
        activations[c].thread_elements()[1] = float(x[2 * c + 1][b][t]);
      }
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        simdgroup_float8x8 decoded;
        decoded.thread_elements()[0] = runs[i].weight(4 * b + t, scales[i]);
        decoded.thread_elements()[1] = runs[i].weight(4 * b + 2 + t, scales[i]);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
          simdgroup_multiply_accumulate(sums[i][c], decoded, activations[c], sums[i][c]);
        }
      }
    }
  }
}

// All chains, shared between the simdgroups of a threadgroup: afterwards chains holds 8 sums of every
// element, for total() to add. It takes CHAINS * TILES * COLUMN_TILES * 64 floats.
template <int SIMDGROUPS, typename M, int MATRICES, int TILES, int COLUMN_TILES, typename T>
METAL_FUNC void multiply_tiles(
    thread const M (&matrices)[MATRICES], thread const uint (&rows)[TILES],
    const device T* const thread (&columns)[2 * COLUMN_TILES], uint simdgroup, uint lane,
    threadgroup float* chains) {
  for (uint chain = simdgroup; chain < CHAINS; chain += SIMDGROUPS) {
    simdgroup_float8x8 sums[TILES][COLUMN_TILES];
#pragma unroll
    for (int i = 0; i < TILES * COLUMN_TILES; i++) {
      sums[i / COLUMN_TILES][i % COLUMN_TILES] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    add_chain<M, MATRICES, TILES, COLUMN_TILES, T>(matrices, rows, columns, chain, lane, sums);
    const uint element = tile_row(lane) * 8 + tile_column(lane);
#pragma unroll
    for (int i = 0; i < TILES * COLUMN_TILES; i++) {
      const auto pair = sums[i / COLUMN_TILES][i % COLUMN_TILES].thread_elements();
      threadgroup float* to = chains + (chain * TILES * COLUMN_TILES + i) * 64 + element;
      to[0] = pair[0];
      to[1] = pair[1];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// The sum of tile's row times column, 0..8 * COLUMN_TILES - 1.
template <int TILES, int COLUMN_TILES>
METAL_FUNC float total(const threadgroup float* chains, uint tile, uint row, uint column) {
  constexpr int STRIDE = TILES * COLUMN_TILES * 64;
  const threadgroup float* p =
      chains + (tile * COLUMN_TILES + column / 8) * 64 + row * 8 + column % 8;
  return ((p[0] + p[STRIDE]) + (p[2 * STRIDE] + p[3 * STRIDE])) +
      ((p[4 * STRIDE] + p[5 * STRIDE]) + (p[6 * STRIDE] + p[7 * STRIDE]));
}

// ---- few columns: plain fma --------------------------------------------------------------------

// sums[r][c]: weight row rows[r] times the column that starts at columns[c], the same in the 8 lanes
// that share rows and columns and differ in chain = lane % 8. Rows are spread over the matrices
// evenly. All lanes of a simdgroup must come here.
template <typename M, int MATRICES, int ROWS, int COLUMNS, typename T>
METAL_FUNC void multiply_rows(
    thread const M (&matrices)[MATRICES], thread const uint (&rows)[ROWS],
    const device T* const thread (&columns)[COLUMNS], uint chain,
    thread float (&sums)[ROWS][COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    sums[i / COLUMNS][i % COLUMNS] = 0.0f;
  }
  for (uint unit = chain; unit < matrices[0].k / M::UNIT; unit += CHAINS) {
    const uint k = unit * M::UNIT;
    Run<M, M::UNIT> units[ROWS];
    Scale scales[ROWS][M::SCALES];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      thread const M& m = matrices[r * MATRICES / ROWS];
      units[r].load(m, rows[r], k);
#pragma unroll
      for (int s = 0; s < M::SCALES; s++) {
        scales[r][s] = m.scale(rows[r], k + s * (M::UNIT / M::SCALES));
      }
    }
#pragma unroll
    for (int b = 0; b < M::RUN / 4; b++) {
      vec<T, 4> x[COLUMNS][RUNS];
#pragma unroll
      for (int i = 0; i < COLUMNS * RUNS; i++) {
        const int m = i / RUNS, c = i % RUNS;
        x[m][c] = *(const device vec<T, 4>*)(columns[m] + k + c * M::RUN + 4 * b);
      }
#pragma unroll
      for (int i = 0; i < 4 * RUNS; i++) {
        const int t = i / (2 * RUNS), c = i / 2 % RUNS, p = i % 2;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const Scale scale = scales[r][c * M::SCALES / RUNS];
          const float weight = units[r].weight(M::RUN * c + 4 * b + 2 * p + t, scale);
#pragma unroll
          for (int m = 0; m < COLUMNS; m++) {
            sums[r][m] = fma(weight, float(x[m][c][2 * p + t]), sums[r][m]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    float sum = sums[i / COLUMNS][i % COLUMNS];
    sum += simd_shuffle_xor(sum, 1);
    sum += simd_shuffle_xor(sum, 2);
    sum += simd_shuffle_xor(sum, 4);
    sums[i / COLUMNS][i % COLUMNS] = sum;
  }
}
