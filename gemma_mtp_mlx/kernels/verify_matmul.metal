// Linear layers over the few positions of a pass: y = x W^T, one launch for layers that share x.
//
// The sums, their order and why are weights.metal's. Here: who computes what, and what follows.
// Up to 4 positions, *_rows: a simdgroup owns 4 * ROWS weight rows. 8 neighbouring lanes are the 8
// chains of the same rows, so they read 8 neighbouring units of a weight row; a lane has ROWS rows,
// which share its activations. Simdgroups share nothing, so threadgroups are small and small matrices
// still reach every core.
// More positions, *_tiles: a threadgroup owns TILES * 8 weight rows and 8 or 16 positions, its
// simdgroups the chains: weights are read once for up to 16 positions, and a small matrix has 8 times
// as many simdgroups as tiles. The only barrier is the one before the chains are added. Further
// positions are further threadgroups, next to each other in the grid to find the weights in a cache.
// Sums are rounded to T once; what is computed from them starts from that.

#include "weights.metal"
#include "geglu.metal"

// ---- what becomes of the sums of a weight row and a position (column) --------------------------

template <typename T> struct Store {
  device T* y; // [columns, n]
  uint n;
  METAL_FUNC void operator()(uint row, uint column, thread const float (&sums)[1]) const {
    y[size_t(column) * n + row] = T(sums[0]);
  }
};

template <typename T> struct Gated {
  device T* y;
  uint n;
  METAL_FUNC void operator()(uint row, uint column, thread const float (&sums)[2]) const {
    y[size_t(column) * n + row] = geglu(T(sums[0]), T(sums[1]));
  }
};

template <typename T> struct GatedBy {
  const device T* values; // [columns, n]
  device T* y;
  uint n;
  METAL_FUNC void operator()(uint row, uint column, thread const float (&sums)[1]) const {
    const size_t i = size_t(column) * n + row;
    y[i] = geglu(T(sums[0]), values[i]);
  }
};

// ---- up to 4 positions -------------------------------------------------------------------------

// Rows 4 * ROWS * tile onwards of each matrix times all COLUMNS rows of x.
template <int ROWS, int COLUMNS, int MATRICES, typename M, typename T, typename F>
METAL_FUNC void finish_rows(
    const device T* x, thread const M (&matrices)[MATRICES], F finish, uint tile, uint lane) {
  const uint n = matrices[0].n, first = tile * 4 * ROWS + lane / CHAINS, chain = lane % CHAINS;
  if (tile * 4 * ROWS >= n) {
    return;
  }
  uint rows[MATRICES * ROWS];
#pragma unroll
  for (int i = 0; i < MATRICES * ROWS; i++) {
    rows[i] = min(first + i % ROWS * 4, n - 1);
  }
  const device T* columns[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    columns[i] = x + size_t(i) * matrices[0].k;
  }
  float all[MATRICES * ROWS][COLUMNS];
  multiply_rows<M, MATRICES, MATRICES * ROWS, COLUMNS, T>(matrices, rows, columns, chain, all);
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS; i++) {
    const int r = i / COLUMNS, column = i % COLUMNS;
    float sums[MATRICES];
#pragma unroll
    for (int j = 0; j < MATRICES; j++) {
      sums[j] = all[j * ROWS + r][column];
    }
    if (chain == uint(i % CHAINS) && first + r * 4 < n) {
      finish(first + r * 4, column, sums);
    }
  }
}

// ---- more positions ----------------------------------------------------------------------------

// Rows 8 * TILES * tile onwards of each matrix times columns block.x onwards, of `count`.
template <
    int SIMDGROUPS, int TILES, int COLUMN_TILES, int MATRICES, typename M, typename T, typename F>
METAL_FUNC void finish_tiles(
    const device T* x, uint count, thread const M (&matrices)[MATRICES], F finish, uint tile,
    uint block, threadgroup float* chains, uint simdgroup, uint lane) {
  constexpr uint HEIGHT = 8 * TILES, WIDTH = 8 * COLUMN_TILES;
  const uint n = matrices[0].n, first_row = tile * HEIGHT, first_column = block * WIDTH;
  uint rows[MATRICES * TILES];
#pragma unroll
  for (int i = 0; i < MATRICES * TILES; i++) {
    rows[i] = min(first_row + i % TILES * 8 + tile_row(lane), n - 1);
  }
  const device T* columns[2 * COLUMN_TILES]; // past the end: the last again, not stored
#pragma unroll
  for (int i = 0; i < 2 * COLUMN_TILES; i++) {
    const uint column = first_column + i / 2 * 8 + tile_column(lane) + i % 2;
    columns[i] = x + size_t(min(column, count - 1)) * matrices[0].k;
  }
  multiply_tiles<SIMDGROUPS, M, MATRICES, MATRICES * TILES, COLUMN_TILES, T>(
      matrices, rows, columns, simdgroup, lane, chains);
  for (uint i = simdgroup * 32 + lane; i < HEIGHT * WIDTH; i += SIMDGROUPS * 32) {
    const uint row = i % HEIGHT, column = i / HEIGHT;
    float sums[MATRICES];
#pragma unroll
    for (int j = 0; j < MATRICES; j++) {
      sums[j] = total<MATRICES * TILES, COLUMN_TILES>(chains, j * TILES + row / 8, row % 8, column);
    }
    if (first_row + row < n && first_column + column < count) {
      finish(first_row + row, first_column + column, sums);
    }
  }
}

// ---- several matrices, one result behind the other ---------------------------------------------

// Which of 1 to 3 matrices a tile of `height` weight rows is in, when tiles are counted through them.
// tile becomes its number there, y where its outputs begin.
template <int COUNT, typename M, typename T>
METAL_FUNC M
pick(M m0, M m1, M m2, uint columns, uint height, thread uint& tile, device T* thread& y) {
  const uint tiles0 = (m0.n + height - 1) / height, tiles1 = (m1.n + height - 1) / height;
  if (COUNT == 1 || tile < tiles0) {
    return m0;
  }
  tile -= tiles0;
  y += size_t(columns) * m0.n;
  if (COUNT == 2 || tile < tiles1) {
    return m1;
  }
  tile -= tiles1;
  y += size_t(columns) * m1.n;
  return m2;
}

template <int ROWS, int COLUMNS, int COUNT, typename M, typename T>
METAL_FUNC void project_rows(
    const device T* x, M m0, M m1, M m2, device T* y, uint tile, uint lane) {
  const M m[1] = {pick<COUNT>(m0, m1, m2, COLUMNS, 4 * ROWS, tile, y)};
  finish_rows<ROWS, COLUMNS, 1>(x, m, Store<T>{y, m[0].n}, tile, lane);
}

template <int SIMDGROUPS, int TILES, int COLUMN_TILES, int COUNT, typename M, typename T>
METAL_FUNC void project_tiles(
    const device T* x, uint count, M m0, M m1, M m2, device T* y, uint tile, uint block,
    threadgroup float* chains, uint simdgroup, uint lane) {
  const M m[1] = {pick<COUNT>(m0, m1, m2, count, 8 * TILES, tile, y)};
  finish_tiles<SIMDGROUPS, TILES, COLUMN_TILES, 1>(
      x, count, m, Store<T>{y, m[0].n}, tile, block, chains, simdgroup, lane);
}

// ---- a matrix, or two of one shape, and a gated activation -------------------------------------

template <int ROWS, int COLUMNS, typename M, typename T>
METAL_FUNC void gated_rows(const device T* x, M gate, M up, device T* y, uint tile, uint lane) {
  const M m[2] = {gate, up};
  finish_rows<ROWS, COLUMNS, 2>(x, m, Gated<T>{y, gate.n}, tile, lane);
}

template <int SIMDGROUPS, int TILES, int COLUMN_TILES, typename M, typename T>
METAL_FUNC void gated_tiles(
    const device T* x, uint count, M gate, M up, device T* y, uint tile, uint block,
    threadgroup float* chains, uint simdgroup, uint lane) {
  const M m[2] = {gate, up};
  finish_tiles<SIMDGROUPS, TILES, COLUMN_TILES, 2>(
      x, count, m, Gated<T>{y, gate.n}, tile, block, chains, simdgroup, lane);
}

template <int ROWS, int COLUMNS, typename M, typename T>
METAL_FUNC void gated_by_rows(
    const device T* x, M gate, const device T* values, device T* y, uint tile, uint lane) {
  const M m[1] = {gate};
  finish_rows<ROWS, COLUMNS, 1>(x, m, GatedBy<T>{values, y, gate.n}, tile, lane);
}

template <int SIMDGROUPS, int TILES, int COLUMN_TILES, typename M, typename T>
METAL_FUNC void gated_by_tiles(
    const device T* x, uint count, M gate, const device T* values, device T* y, uint tile,
    uint block, threadgroup float* chains, uint simdgroup, uint lane) {
  const M m[1] = {gate};
  finish_tiles<SIMDGROUPS, TILES, COLUMN_TILES, 1>(
      x, count, m, GatedBy<T>{values, y, gate.n}, tile, block, chains, simdgroup, lane);
}
