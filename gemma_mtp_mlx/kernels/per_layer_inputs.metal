// What each layer adds from its own embedding of a token: one simdgroup makes it for one layer of
// one token.
//
// A lane holds every 32nd element. The sum of squares has one order: a lane adds what it holds in
// ascending order, simd_sum adds the lanes. Values are rounded to T where MLX's operations would
// round them.

#include <metal_stdlib>
using namespace metal;

// (norm(context * scales[0]) + by_token * scales[1]) * scales[2] of P elements of `task`, which
// counts the layers of a token and then tokens. context, by_token: [tokens, layers, P];
// out: [layers, tokens, P].
template <uint P, typename T, typename Scales>
inline void per_layer_input(
    const device T* context, const device T* by_token, const device T* weight, Scales scales,
    float eps, device T* out, uint tokens, uint layers, uint task, uint lane) {
    constexpr uint COUNT = (P + 31) / 32;
    const uint token = task / layers, layer = task % layers;
    if (token >= tokens) {
        return;
    }
    context += size_t(task) * P;
    by_token += size_t(task) * P;
    out += (size_t(layer) * tokens + token) * P;
    float x[COUNT];
    float sum = 0.0f;
#pragma unroll
    for (uint i = 0; i < COUNT; ++i) {
        const uint p = i * 32 + lane;
        x[i] = p < P ? float(T(float(context[p]) * float(scales[0]))) : 0.0f;
        sum = fma(x[i], x[i], sum);
    }
    const float factor = precise::rsqrt(simd_sum(sum) / P + eps);
#pragma unroll
    for (uint i = 0; i < COUNT; ++i) {
        const uint p = i * 32 + lane;
        if (p < P) {
            const T normed = T(float(T(x[i] * factor)) * float(weight[p]));
            const T scaled = T(float(by_token[p]) * float(scales[1]));
            out[p] = T(float(T(float(normed) + float(scaled))) * float(scales[2]));
        }
    }
}
