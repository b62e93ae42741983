// A residual connection and the norms around it: one threadgroup makes one row of E elements.
//
// The order of a row's sum of squares depends on E alone. Elements are taken by fours, and four e is
// held by lane e % 32 of strand e / 32 % STRANDS. A lane adds what it holds in ascending order,
// simd_sum adds a strand's lanes, and the strands are added in order; which simdgroup has which
// strands changes nothing. Values are rounded to T where MLX's operations would round them.

#include <metal_stdlib>
using namespace metal;

constant constexpr uint STRANDS = 8;

template <typename T>
inline float4 widened(vec<T, 4> x) {
    return float4(float(x.x), float(x.y), float(x.z), float(x.w));
}

template <typename T>
inline vec<T, 4> narrowed(float4 x) {
    return vec<T, 4>(T(x.x), T(x.y), T(x.z), T(x.w));
}

template <typename T>
inline float4 rounded(float4 x) {
    return widened<T>(narrowed<T>(x));
}

// What one thread holds of a row, zero where there is nothing for it to hold.
template <typename T, uint E, uint THREADS>
struct Part {
    enum : uint {
        SIMDGROUPS = THREADS / 32,
        STRANDS_EACH = (STRANDS + SIMDGROUPS - 1) / SIMDGROUPS,
        FOURS = (E / 4 + 32 * STRANDS - 1) / (32 * STRANDS), // of a lane in one strand
        COUNT = STRANDS_EACH * FOURS,
    };

    float4 held[COUNT];

    static uint strand(uint i, uint thread_index) {
        return i / FOURS * SIMDGROUPS + thread_index / 32;
    }

    // The number of the four elements at held[i].
    static uint four(uint i, uint thread_index) {
        return (i % FOURS * STRANDS + strand(i, thread_index)) * 32 + thread_index % 32;
    }

    static bool is_held(uint i, uint thread_index) {
        return strand(i, thread_index) < STRANDS && four(i, thread_index) < E / 4;
    }

    static float4 read(const device T* row, uint i, uint thread_index) {
        const device vec<T, 4>* fours = reinterpret_cast<const device vec<T, 4>*>(row);
        return widened<T>(fours[four(i, thread_index)]);
    }

    void load(const device T* row, uint thread_index) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            held[i] = float4(0.0f);
            if (is_held(i, thread_index)) {
                held[i] = read(row, i, thread_index);
            }
        }
    }

    void store(device T* row, uint thread_index) const {
        device vec<T, 4>* fours = reinterpret_cast<device vec<T, 4>*>(row);
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            if (is_held(i, thread_index)) {
                fours[four(i, thread_index)] = narrowed<T>(held[i]);
            }
        }
    }

    // Writes each strand's sum of squares; the threadgroup has to wait before it reads them.
    void square_sums(threadgroup float* sums, uint thread_index) const {
        float sum = 0.0f;
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            const float4 x = held[i];
            sum = fma(x.w, x.w, fma(x.z, x.z, fma(x.y, x.y, fma(x.x, x.x, sum))));
            if (i % FOURS == FOURS - 1) {
                const float total = simd_sum(sum);
                if (thread_index % 32 == 0 && strand(i, thread_index) < STRANDS) {
                    sums[strand(i, thread_index)] = total;
                }
                sum = 0.0f;
            }
        }
    }

    // The row times factor, then times weight.
    Part normed(float factor, const device T* weight, uint thread_index) const {
        Part out;
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            out.held[i] = float4(0.0f);
            if (is_held(i, thread_index)) {
                const float4 x = rounded<T>(held[i] * factor);
                out.held[i] = rounded<T>(x * read(weight, i, thread_index));
            }
        }
        return out;
    }

    void add(Part other) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            held[i] = rounded<T>(held[i] + other.held[i]);
        }
    }

    void multiply(float factor) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            held[i] = rounded<T>(held[i] * factor);
        }
    }
};

// 1 / root mean square, from the sums of the strands.
template <uint E>
inline float inverse_rms(const threadgroup float* sums, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (uint strand = 0; strand < STRANDS; ++strand) {
        sum += sums[strand];
    }
    return precise::rsqrt(sum / E + eps);
}

// What is added to a row: nothing, normed x, or normed (normed x + normed y).
template <typename T>
struct Added {
    const device T* x;
    const device T* y;
    const device T* weight;
    const device T* x_weight;
    const device T* y_weight;
};

// The norms that come next, and where they go.
template <typename T, uint COUNT>
struct Nexts {
    const device T* weights[COUNT];
    device T* normed[COUNT];
};

template <typename T>
struct Nexts<T, 0> {};

template <typename T, uint E, uint THREADS>
inline void write_nexts(
    Part<T, E, THREADS>, Nexts<T, 0>, size_t, float, threadgroup float*, uint) {}

template <typename T, uint E, uint THREADS, uint COUNT>
inline void write_nexts(
    Part<T, E, THREADS> state, Nexts<T, COUNT> nexts, size_t row, float eps,
    threadgroup float* sums, uint thread_index) {
    state.square_sums(sums, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float factor = inverse_rms<E>(sums, eps);
#pragma unroll
    for (uint i = 0; i < COUNT; ++i) {
        state.normed(factor, nexts.weights[i], thread_index)
            .store(nexts.normed[i] + row, thread_index);
    }
}

// All but `scalar`, `eps` and weights are [M, E]; ADDED: how many rows `added` has.
// sums: 4 * STRANDS floats, each sum in its own place, so that none waits to be read.
template <uint E, uint THREADS, uint ADDED, bool SCALED, typename T, uint COUNT, typename Scalar>
inline void residual_norm(
    const device T* h, Added<T> added, Scalar scalar, device T* out, Nexts<T, COUNT> nexts,
    float eps, threadgroup float* sums, uint m, uint thread_index) {
    const size_t row = size_t(m) * E;
    Part<T, E, THREADS> state;
    state.load(h + row, thread_index);
    if (ADDED > 0) {
        Part<T, E, THREADS> x;
        x.load(added.x + row, thread_index);
        if (ADDED > 1) {
            Part<T, E, THREADS> y;
            y.load(added.y + row, thread_index);
            x.square_sums(sums + STRANDS, thread_index);
            y.square_sums(sums + 2 * STRANDS, thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const float x_factor = inverse_rms<E>(sums + STRANDS, eps);
            const float y_factor = inverse_rms<E>(sums + 2 * STRANDS, eps);
            x = x.normed(x_factor, added.x_weight, thread_index);
            x.add(y.normed(y_factor, added.y_weight, thread_index));
        }
        x.square_sums(sums, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        state.add(x.normed(inverse_rms<E>(sums, eps), added.weight, thread_index));
    }
    if (SCALED) {
        state.multiply(float(scalar[0]));
    }
    state.store(out + row, thread_index);
    write_nexts(state, nexts, row, eps, sums + 3 * STRANDS, thread_index);
}
