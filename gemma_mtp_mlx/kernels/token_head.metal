// The language model head: the logits of hidden states, or the tokens drawn from them unwritten.
//
// A logit is made of weights.metal's sums, as verify_matmul's results are, and drawn from as
// draw_tokens.metal does. A threadgroup goes through several tiles of weight rows, the ids, and
// leaves its best choice for each position.

#include "verify_matmul.metal"
#include "draw_tokens.metal"

// A sum as a logit: rounded to the dtype of activations, then capped. cap: 0 for none.
template <typename T>
METAL_FUNC float as_logit(float sum, float cap) {
    const float logit = float(T(sum));
    return cap > 0.0f ? precise::tanh(logit / cap) * cap : logit;
}

// ---- tokens, up to 4 positions -------------------------------------------------------------------

struct AllIds {
    METAL_FUNC uint operator()(uint i) const { return i; }
};

// The 8 lanes that have the sums of the same ROWS weight rows share out the work on them: a lane has
// one position, if it has any, and every STEP-th of the rows.
template <int COLUMNS>
struct Lanes {
    enum : int { SPREAD = COLUMNS == 3 ? 4 : COLUMNS, STEP = CHAINS / SPREAD };

    static METAL_FUNC uint column(uint lane) { return lane % SPREAD; }
    static METAL_FUNC uint row(uint lane) { return lane % CHAINS / SPREAD; }
};

// The best of ids(i), i < count, that this lane comes across, at its position. A simdgroup takes
// 4 * ROWS ids at a time, batch number `simdgroup` and every `simdgroups`-th after it.
template <int ROWS, int COLUMNS, typename M, typename T, typename Ids>
METAL_FUNC Choice best_of_rows(
    const device T* const thread (&columns)[COLUMNS], M head, float cap, Draw draw, Ids ids,
    uint count, uint simdgroup, uint simdgroups, uint lane) {
    typedef Lanes<COLUMNS> L;
    const M matrices[1] = {head};
    Choice choice = no_choice();
    for (uint tile = simdgroup; tile * 4 * ROWS < count; tile += simdgroups) {
        const uint first = tile * 4 * ROWS + lane / CHAINS;
        uint rows[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            rows[i] = ids(min(first + i * 4, count - 1)); // past the end: the last again
        }
        float sums[ROWS][COLUMNS];
        multiply_rows<M, 1, ROWS, COLUMNS, T>(matrices, rows, columns, lane % CHAINS, sums);
        for (uint r = L::row(lane); r < uint(ROWS); r += L::STEP) {
            uint id = 0;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < ROWS * COLUMNS; i++) {
                const bool mine = r == uint(i / COLUMNS) && L::column(lane) == uint(i % COLUMNS);
                id = mine ? rows[i / COLUMNS] : id;
                sum = mine ? sums[i / COLUMNS][i % COLUMNS] : sum;
            }
            if (L::column(lane) < uint(COLUMNS)) {
                const Choice other = {score(as_logit<T>(sum, cap), draw, id), id};
                choice = better(choice, other);
            }
        }
    }
    return choice;
}

// scores, ids: [COLUMNS, groups]; best_scores, best_ids: COLUMNS per simdgroup.
template <int SIMDGROUPS, int ROWS, int COLUMNS, typename M, typename T, typename D>
METAL_FUNC void choose_rows(
    const device T* x, M head, float cap, D draws, device float* scores, device uint* ids,
    threadgroup float* best_scores, threadgroup uint* best_ids,
    uint group, uint groups, uint simdgroup, uint lane) {
    typedef Lanes<COLUMNS> L;
    const device T* columns[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        columns[i] = x + size_t(i) * head.k;
    }
    Choice choice = best_of_rows<ROWS, COLUMNS>(
        columns, head, cap, draws.at(min(L::column(lane), uint(COLUMNS - 1))), AllIds(), head.n,
        group * SIMDGROUPS + simdgroup, groups * SIMDGROUPS, lane);
    choice = best_of_lanes(choice, 16, L::SPREAD);
    if (lane < uint(COLUMNS)) {
        best_scores[simdgroup * COLUMNS + lane] = choice.score;
        best_ids[simdgroup * COLUMNS + lane] = choice.id;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && lane < uint(COLUMNS)) {
        for (int i = 1; i < SIMDGROUPS; i++) {
            const Choice other = {
                best_scores[i * COLUMNS + lane], best_ids[i * COLUMNS + lane]};
            choice = better(choice, other);
        }
        scores[lane * groups + group] = choice.score;
        ids[lane * groups + group] = choice.id;
    }
}

// ---- tokens, more positions ----------------------------------------------------------------------

// What a thread has chosen, for each of its elements of a tile of HEIGHT x WIDTH.
template <int THREADS, int HEIGHT, int WIDTH, typename T, typename D>
struct Choose {
    thread Choice* choices;
    D draws;
    float cap;

    METAL_FUNC void operator()(uint row, uint column, thread const float (&sums)[1]) const {
        const uint element = (column % WIDTH * HEIGHT + row % HEIGHT) / THREADS;
        const Choice other = {score(as_logit<T>(sums[0], cap), draws.at(column), row), row};
        choices[element] = better(choices[element], other);
    }
};

// Threadgroup (block of positions, group). scores, ids: [count, groups].
template <int SIMDGROUPS, int TILES, int COLUMN_TILES, typename M, typename T, typename D>
METAL_FUNC void choose_tiles(
    const device T* x, uint count, M head, float cap, D draws, device float* scores,
    device uint* ids, threadgroup float* chains,
    uint block, uint group, uint groups, uint simdgroup, uint lane) {
    constexpr int HEIGHT = 8 * TILES, WIDTH = 8 * COLUMN_TILES, THREADS = SIMDGROUPS * 32;
    constexpr int ELEMENTS = (HEIGHT * WIDTH + THREADS - 1) / THREADS;
    Choice choices[ELEMENTS];
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        choices[i] = no_choice();
    }
    const M matrices[1] = {head};
    const Choose<THREADS, HEIGHT, WIDTH, T, D> choose = {choices, draws, cap};
    for (uint tile = group; tile * HEIGHT < head.n; tile += groups) {
        finish_tiles<SIMDGROUPS, TILES, COLUMN_TILES, 1>(
            x, count, matrices, choose, tile, block, chains, simdgroup, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup); // the next tile writes chains
    }
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const Choice choice = best_of_lanes(choices[i], HEIGHT / 2, 1);
        const uint element = i * THREADS + simdgroup * 32 + lane;
        const uint column = block * WIDTH + element / HEIGHT;
        if (element % HEIGHT == 0 && element < uint(HEIGHT * WIDTH) && column < count) {
            scores[column * groups + group] = choice.score;
            ids[column * groups + group] = choice.id;
        }
    }
}

// ---- logits --------------------------------------------------------------------------------------

template <typename T>
struct StoreLogit {
    device float* logits; // [columns, n]
    uint n;
    float cap;

    METAL_FUNC void operator()(uint row, uint column, thread const float (&sums)[1]) const {
        logits[size_t(column) * n + row] = as_logit<T>(sums[0], cap);
    }
};

template <int ROWS, int COLUMNS, typename M, typename T>
METAL_FUNC void logits_rows(
    const device T* x, M head, float cap, device float* logits, uint tile, uint lane) {
    const M matrices[1] = {head};
    finish_rows<ROWS, COLUMNS, 1>(
        x, matrices, StoreLogit<T>{logits, head.n, cap}, tile, lane);
}

template <int SIMDGROUPS, int TILES, int COLUMN_TILES, typename M, typename T>
METAL_FUNC void logits_tiles(
    const device T* x, uint count, M head, float cap, device float* logits, uint tile, uint block,
    threadgroup float* chains, uint simdgroup, uint lane) {
    const M matrices[1] = {head};
    finish_tiles<SIMDGROUPS, TILES, COLUMN_TILES, 1>(
        x, count, matrices, StoreLogit<T>{logits, head.n, cap}, tile, block, chains, simdgroup,
        lane);
}
