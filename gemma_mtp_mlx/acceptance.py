"""The acceptance rule: keep drafts up to the first that is not the target's own token."""

import mlx.core as mx


def accept(drafts: mx.array, choices: mx.array, limits: mx.array | None = None) -> mx.array:
    """Count the drafts to keep.

    drafts: [B, K]; choices: [B, K + 1] the target's own draw at every position of the block;
    limits: [B] most drafts to keep, None for K.
    Returns: [B] int32 in 0..K. choices[b, count] is then the bonus token, and since
    drafts[b, :count] == choices[b, :count], row b's new tokens are choices[b, : count + 1].
    Source: Daliri, Musco, Suresh 2024 (drafter-invariant speculative decoding), for the draws
    that share their noise; plain prefix matching for greedy.
    """
    agree = (drafts == choices[:, :-1]).astype(mx.int32)
    count = mx.cumprod(agree, axis=1).sum(axis=1).astype(mx.int32)
    return count if limits is None else mx.minimum(count, limits)
