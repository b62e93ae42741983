// Gumbel noise from a counter-based generator: key (seed, position), counter token id.
//
// The 32-bit words are those that sampling.gumbel takes from mlx.core.random, bit for bit.

#include <metal_stdlib>
using namespace metal;

constant constexpr uint TURNS[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};

// Threefry-2x32 with 20 rounds. Source: Salmon et al. 2011, "Parallel random numbers: as easy as
// 1, 2, 3", section 3.3.
inline uint2 threefry(uint2 key, uint2 counter) {
    const uint schedule[3] = {key.x, key.y, key.x ^ key.y ^ 0x1BD11BDA};
    uint2 x = counter + key;
#pragma unroll
    for (uint step = 0; step < 5; ++step) {
#pragma unroll
        for (uint i = 0; i < 4; ++i) {
            x.x += x.y;
            x.y = rotate(x.y, TURNS[step % 2][i]) ^ x.x;
        }
        x.x += schedule[(step + 1) % 3];
        x.y += schedule[(step + 2) % 3] + step + 1;
    }
    return x;
}

// The word of one token id. MLX fills [0, vocab) with the first words of counters (i, i + half),
// then with their second ones; half is rounded up.
inline uint noise_word(uint seed, uint position, uint id, uint vocab) {
    const uint middle = (vocab + 1) / 2;
    const uint i = id < middle ? id : id - middle;
    const uint2 words = threefry(uint2(seed, position), uint2(i, i + middle));
    return id < middle ? words.x : words.y;
}

// -log(1 - v), 0 < v < 1, without losing small v. Source: Goldberg 1991, theorem 4.
inline float minus_log1m(float v) {
    const float rest = 1.0f - v;
    return rest == 1.0f ? v : v * (precise::log(rest) / (rest - 1.0f));
}

// Large values come from small v = (word + .5) / 2^32, which floats resolve.
inline float gumbel(uint word) {
    const float v = (float(word) + 0.5f) * (1.0f / 4294967296.0f);
    return -precise::log(minus_log1m(min(v, 1.0f - 1.0f / 16777216.0f)));
}
