// The centroid head: a token drawn among those of the COUNT clusters whose centroids score best.
//
// One threadgroup per row and chosen cluster. Each finds its cluster by itself, which costs it little
// more than reading the scores, and leaves its best choice.

#include "token_head.metal"

template <typename T>
METAL_FUNC uint bits_of(T x) { return as_type<ushort>(x); }
template <>
METAL_FUNC uint bits_of<float>(float x) { return as_type<uint>(x); }

// A number above 0, ordered as x is. Both zeros are one.
template <typename T>
METAL_FUNC uint order_of(T x) {
    constexpr uint SIGN = 1u << (8 * sizeof(T) - 1);
    const uint bits = x == T(0) ? 0 : bits_of(x);
    return bits & SIGN ? SIGN - 1 - (bits - SIGN) : bits | SIGN;
}

// The sum over a threadgroup. sums: one per simdgroup, not in use.
template <int SIMDGROUPS>
METAL_FUNC uint threadgroup_sum(uint x, threadgroup uint* sums, uint simdgroup, uint lane) {
    x = simd_sum(x);
    if (lane == 0) {
        sums[simdgroup] = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    x = 0;
    for (int i = 0; i < SIMDGROUPS; i++) {
        x += sums[i];
    }
    return x;
}

// The centroid that is number `rank`, in their own order, of the COUNT best, the first among equals.
// centroid_scores: [CENTROIDS], values of T; memory: 2 * SIMDGROUPS + 1.
template <int SIMDGROUPS, int CENTROIDS, int COUNT, typename T>
METAL_FUNC uint chosen_centroid(
    const device float* centroid_scores, uint rank, threadgroup uint* memory,
    uint simdgroup, uint lane) {
    constexpr uint THREADS = SIMDGROUPS * 32, OWN = (CENTROIDS + THREADS - 1) / THREADS;
    const uint begin = (simdgroup * 32 + lane) * OWN;
    uint orders[OWN]; // 0: none
    for (uint i = 0; i < OWN; i++) {
        orders[i] = begin + i < CENTROIDS ? order_of(T(centroid_scores[begin + i])) : 0;
    }
    uint least = 0; // grows, bit by bit, to the most that COUNT of them reach
    for (uint bit = 8 * sizeof(T); bit-- > 0;) {
        uint reach = 0;
        for (uint i = 0; i < OWN; i++) {
            reach += orders[i] >= (least | 1u << bit);
        }
        threadgroup uint* sums = memory + bit % 2 * SIMDGROUPS; // the others may still be read
        reach = threadgroup_sum<SIMDGROUPS>(reach, sums, simdgroup, lane);
        least |= reach >= COUNT ? 1u << bit : 0;
    }
    // Those above `least` are chosen, and the first of those that equal it.
    uint above = 0, equal = 0;
    for (uint i = 0; i < OWN; i++) {
        above += orders[i] > least;
        equal += orders[i] == least;
    }
    const uint all_above = threadgroup_sum<SIMDGROUPS>(above, memory + SIMDGROUPS, simdgroup, lane);
    const uint spare = COUNT - all_above;
    const uint both = above << 16 | equal;
    uint before = simd_prefix_exclusive_sum(both);
    if (lane == 31) {
        memory[simdgroup] = before + both;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < simdgroup; i++) {
        before += memory[i];
    }
    for (uint i = 0; i < OWN; i++) {
        const uint equal_before = before & 0xFFFF;
        const bool chosen = orders[i] > least || (orders[i] == least && equal_before < spare);
        if (chosen && (before >> 16) + min(equal_before, spare) == rank) {
            memory[2 * SIMDGROUPS] = begin + i;
        }
        before += orders[i] > least ? 1u << 16 : orders[i] == least ? 1 : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return memory[2 * SIMDGROUPS];
}

struct SomeIds {
    const device int* ids;

    METAL_FUNC uint operator()(uint i) const { return uint(ids[i]); }
};

// Threadgroup (rank, row). centroid_scores: [B, CENTROIDS]; h: [B, head.k]; ordering: [head.n], the
// tokens of a cluster next to each other; scores, ids: [B, COUNT]; best_scores, best_ids: one per
// simdgroup.
template <int SIMDGROUPS, int ROWS, int CENTROIDS, int COUNT, typename M, typename T, typename D>
METAL_FUNC void choose_in_cluster(
    const device float* centroid_scores, const device T* h, M head, const device int* ordering,
    D draws, device float* scores, device uint* ids, threadgroup uint* memory,
    threadgroup float* best_scores, threadgroup uint* best_ids,
    uint rank, uint row, uint simdgroup, uint lane) {
    const uint size = head.n / CENTROIDS;
    const uint centroid = chosen_centroid<SIMDGROUPS, CENTROIDS, COUNT, T>(
        centroid_scores + row * CENTROIDS, rank, memory, simdgroup, lane);
    const device T* columns[1] = {h + size_t(row) * head.k};
    Choice choice = best_of_rows<ROWS, 1>(
        columns, head, 0.0f, draws.at(row), SomeIds{ordering + centroid * size}, size, simdgroup,
        SIMDGROUPS, lane);
    choice = best_of_threadgroup<SIMDGROUPS * 32>(
        choice, best_scores, best_ids, simdgroup * 32 + lane);
    if (simdgroup == 0 && lane == 0) {
        scores[row * COUNT + rank] = choice.score;
        ids[row * COUNT + rank] = choice.id;
    }
}
