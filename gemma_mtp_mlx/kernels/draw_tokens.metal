// Drawing a token: the id whose logit / temperature + noise is largest, the lowest one among equals.
//
// Every kernel that draws calls `score` and `better`, so all choose the same token from the same
// logits, however these are spread over threads.

#include "noise.metal"

// How one position draws; temperature 0 is greedy.
struct Draw {
    float temperature;
    uint seed;
    uint position;
    uint vocab;
};

// How the positions of a batch draw: row after row, `length` of each.
// temperature, seed: one per row; positions: one each.
template <typename Floats, typename Words, typename Ints>
struct Draws {
    Floats temperature;
    Words seed;
    Ints positions;
    uint length;
    uint vocab;

    Draw at(uint m) const {
        return {temperature[m / length], seed[m / length], uint(positions[m]), vocab};
    }
};

template <typename Floats, typename Words, typename Ints>
inline Draws<Floats, Words, Ints> draws(
    Floats temperature, Words seed, Ints positions, uint length, uint vocab) {
    return {temperature, seed, positions, length, vocab};
}

inline float score(float logit, Draw draw, uint id) {
    if (draw.temperature <= 0.0f) {
        return logit;
    }
    const float noise = gumbel(noise_word(draw.seed, draw.position, id, draw.vocab));
    return logit / max(draw.temperature, 1e-6f) + noise;
}

struct Choice {
    float score;
    uint id;
};

// Loses against any other.
inline Choice no_choice() {
    return {-INFINITY, 0xFFFFFFFF};
}

inline Choice better(Choice a, Choice b) {
    return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}

// The best choice among lanes whose numbers differ in the bits from `least` to `most`, in each of
// them. All lanes of the simdgroup must take part.
inline Choice best_of_lanes(Choice choice, ushort most, ushort least) {
    for (ushort bit = most; bit >= least; bit /= 2) {
        const Choice other = {
            simd_shuffle_xor(choice.score, bit), simd_shuffle_xor(choice.id, bit)};
        choice = better(choice, other);
    }
    return choice;
}

// The best of a threadgroup's choices, in every thread. scores, ids: one per simdgroup, not in use.
template <uint THREADS>
inline Choice best_of_threadgroup(
    Choice choice, threadgroup float* scores, threadgroup uint* ids, uint thread_index) {
    choice = best_of_lanes(choice, 16, 1);
    if (thread_index % 32 == 0) {
        scores[thread_index / 32] = choice.score;
        ids[thread_index / 32] = choice.id;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < THREADS / 32; ++i) {
        const Choice other = {scores[i], ids[i]};
        choice = better(choice, other);
    }
    return choice;
}

// Threadgroup (chunk, m): the best of ids chunk * CHUNK and on at position m.
// logits: [M, vocab]; scores, ids: [M, chunks].
template <uint THREADS, uint CHUNK, typename Floats, typename D>
inline void best_of_logits(
    Floats logits, D draws, device float* scores, device uint* ids,
    threadgroup float* best_scores, threadgroup uint* best_ids,
    uint3 group, uint3 groups, uint thread_index) {
    const Draw draw = draws.at(group.y);
    const uint begin = group.x * CHUNK, end = min(begin + CHUNK, draw.vocab);
    Choice choice = no_choice();
    for (uint id = begin + thread_index; id < end; id += THREADS) {
        const float logit = logits[size_t(group.y) * draw.vocab + id];
        const Choice other = {score(logit, draw, id), id};
        choice = better(choice, other);
    }
    choice = best_of_threadgroup<THREADS>(choice, best_scores, best_ids, thread_index);
    if (thread_index == 0) {
        scores[group.y * groups.x + group.x] = choice.score;
        ids[group.y * groups.x + group.x] = choice.id;
    }
}

// Threadgroup m: the id of the best of position m's choices. scores, ids: [M, count]; tokens: [M].
template <uint THREADS, typename Floats, typename Words>
inline void best_of_choices(
    Floats scores, Words ids, uint count, device int* tokens,
    threadgroup float* best_scores, threadgroup uint* best_ids, uint m, uint thread_index) {
    Choice choice = no_choice();
    for (uint i = thread_index; i < count; i += THREADS) {
        const Choice other = {scores[m * count + i], ids[m * count + i]};
        choice = better(choice, other);
    }
    choice = best_of_threadgroup<THREADS>(choice, best_scores, best_ids, thread_index);
    if (thread_index == 0) {
        tokens[m] = choice.id == no_choice().id ? 0 : int(choice.id); // 0: nothing but NaN
    }
}
