"""This project, through its public API. Nobody here makes text, nobody stops early."""

import mlx.core as mx

import gemma_mtp_mlx
from bench.peers.contenders import Clock, Drafting
from gemma_mtp_mlx import SamplingParams, load


class Adapter:
    """A loaded pair at one depth."""

    def __init__(self, model: str, drafts: int | None) -> None:
        self.pair = load(model).endless()
        self.drafts = drafts
        self.versions = {
            "gemma_mtp_mlx": gemma_mtp_mlx.__version__,
            "mlx": mx.__version__,
            "device": str(mx.default_device()),
        }

    def ways(self, batch: int) -> list[str]:
        """Return the ways to run a batch of that size."""
        return ["stream_batch"]

    def run(self, prompts: list[list[int]], max_tokens: int, way: str, clock: Clock) -> Drafting:
        """Generate."""
        drafting = Drafting()
        params = SamplingParams(max_tokens=max_tokens)
        for chunk in self.pair.stream_batch(prompts, params, num_draft_tokens=self.drafts):
            clock.emit(chunk.index, chunk.tokens)
            if chunk.result is not None:
                if chunk.result.finish_reason != "length":
                    raise ValueError(f"a row ended with {chunk.result.finish_reason!r}")
                stats = chunk.result.stats
                positions = list(stats.accepted_per_position)
                drafting.add(
                    Drafting(stats.draft_rounds, stats.draft_n, stats.draft_n_accepted, positions)
                )
        return drafting
