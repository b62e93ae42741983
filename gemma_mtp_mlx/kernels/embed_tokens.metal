// Embeddings of tokens, decoded, scaled, and with other numbers behind each: a thread makes a run.

#include <metal_stdlib>
using namespace metal;

#include "formats.metal"

// Run `run` of token m's [k + extra]. beside: [M, extra]; extra is a multiple of RUN.
// Values are rounded to T before they are scaled, as MLX's operations round them.
template <typename M, typename T, typename Tokens, typename Beside>
METAL_FUNC void embed_run(
    M table, Tokens tokens, T scale, Beside beside, uint extra, device T* out, uint m, uint run) {
    const uint first = run * M::RUN;
    if (first >= table.k + extra) {
        return;
    }
    out += size_t(m) * (table.k + extra) + first;
    if (first >= table.k) {
        beside += size_t(m) * extra + first - table.k;
#pragma unroll
        for (int i = 0; i < M::RUN; ++i) {
            out[i] = T(beside[i]);
        }
        return;
    }
    const uint token = tokens[m];
    const Scale group = table.scale(token, first);
    Run<M> codes;
    codes.load(table, token, first);
#pragma unroll
    for (int i = 0; i < M::RUN; ++i) {
        out[i] = T(float(T(codes.weight(i, group))) * float(scale));
    }
}
