// A layer's projections, normed and turned by RoPE: one simdgroup makes one head of one position.
//
// A lane holds every 32nd pair (p, p + D / 2) of a head, so nothing but the sum of squares leaves
// it: a lane adds what it holds in ascending order, simd_sum adds the lanes. Values are rounded to T
// where MLX's operations would round them.

#include <metal_stdlib>
using namespace metal;

// The head that a simdgroup makes, of one position of one row.
struct Place {
    uint row, position, length, head, lane;

    // Where it goes in [rows, heads, length, D].
    size_t offset(uint heads, uint d) const {
        return (size_t(row * heads + head) * length + position) * d;
    }
};

// A projection, [rows, length, heads * D], wherever its entries lie.
template <typename T>
struct Projection {
    const device T* data;
    const constant int64_t* strides;

    const device T* head(Place place, uint d) const {
        return data + place.row * strides[0] + place.position * strides[1] +
            place.head * d * strides[2];
    }
};

// One lane's part of a head.
template <uint D>
struct Pairs {
    enum : uint { COUNT = (D / 2 + 31) / 32 };

    float left[COUNT], right[COUNT];

    static bool is_held(uint i, uint lane) {
        return i * 32 + lane < D / 2;
    }

    template <typename T>
    void load(const device T* head, int64_t stride, uint lane) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            left[i] = right[i] = 0.0f;
            if (is_held(i, lane)) {
                left[i] = float(head[(i * 32 + lane) * stride]);
                right[i] = float(head[(i * 32 + lane + D / 2) * stride]);
            }
        }
    }

    template <typename T>
    void store(device T* head, uint lane) const {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            if (is_held(i, lane)) {
                head[i * 32 + lane] = T(left[i]);
                head[i * 32 + lane + D / 2] = T(right[i]);
            }
        }
    }

    // Divide by the root mean square. All lanes must take part.
    template <typename T>
    void norm(float eps) {
        float sum = 0.0f;
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            sum = fma(right[i], right[i], fma(left[i], left[i], sum));
        }
        const float factor = precise::rsqrt(simd_sum(sum) / D + eps);
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            left[i] = float(T(left[i] * factor));
            right[i] = float(T(right[i] * factor));
        }
    }

    template <typename T>
    void multiply(const device T* weight, uint lane) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            if (is_held(i, lane)) {
                left[i] = float(T(left[i] * float(weight[i * 32 + lane])));
                right[i] = float(T(right[i] * float(weight[i * 32 + lane + D / 2])));
            }
        }
    }

    // RoPE. wavelengths: [D / 2], infinite where nothing turns.
    void turn(int position, const device float* wavelengths, uint lane) {
#pragma unroll
        for (uint i = 0; i < COUNT; ++i) {
            const float wavelength = is_held(i, lane) ? wavelengths[i * 32 + lane] : INFINITY;
            if (wavelength < INFINITY) {
                const float angle = float(position) / wavelength;
                const float cosine = precise::cos(angle), sine = precise::sin(angle);
                const float first = left[i], second = right[i];
                left[i] = first * cosine - second * sine;
                right[i] = first * sine + second * cosine;
            }
        }
    }
};

// A head divided by its root mean square. All lanes must take part.
template <uint D, typename T>
inline Pairs<D> normed_head(Projection<T> projection, Place place, float eps) {
    Pairs<D> pairs;
    pairs.load(projection.head(place, D), projection.strides[2], place.lane);
    pairs.template norm<T>(eps);
    return pairs;
}

// A query or a key, at `position` in its text. out: [D].
template <uint D, typename T>
inline void turned_head(
    Projection<T> projection, const device T* weight, const device float* wavelengths, int position,
    float eps, device T* out, Place place) {
    Pairs<D> pairs = normed_head<D>(projection, place, eps);
    pairs.multiply(weight, place.lane);
    pairs.turn(position, wavelengths, place.lane);
    pairs.store(out, place.lane);
}

// Head number `head` of queries, then of the block's keys and values, if there are so many.
template <uint D, typename T>
inline void attention_heads(
    Projection<T> q, Projection<T> k, Projection<T> v, const device T* q_weight,
    const device T* k_weight, const device float* wavelengths, int position, float eps,
    uint q_heads, uint kv_heads, device T* queries, device T* block, Place place) {
    if (place.head < q_heads) {
        turned_head<D>(
            q, q_weight, wavelengths, position, eps, queries + place.offset(q_heads, D), place);
        return;
    }
    place.head -= q_heads;
    device T* out = block + place.offset(2 * kv_heads, D);
    if (place.head < kv_heads) {
        turned_head<D>(k, k_weight, wavelengths, position, eps, out, place);
        return;
    }
    place.head -= kv_heads;
    if (place.head < kv_heads) {
        normed_head<D>(v, place, eps).store(out, place.lane);
    }
}

// Query head number `head`, if there is one.
template <uint D, typename T>
inline void query_heads(
    Projection<T> q, const device T* weight, const device float* wavelengths, int position,
    float eps, uint heads, device T* queries, Place place) {
    if (place.head < heads) {
        turned_head<D>(
            q, weight, wavelengths, position, eps, queries + place.offset(heads, D), place);
    }
}
