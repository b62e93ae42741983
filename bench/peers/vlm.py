"""mlx_vlm with its Gemma 4 drafter: the loop of its command line and the one of its server.

It drafts only for the conditional-generation class, so the same weights are first written in that
layout. A model without vision tensors loads: the tower is dropped with a warning. Its batch
generator wants embeddings, which its server computes beforehand; here that counts as prefill.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_vlm.generate.ar import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.utils import load_model

from bench.peers.contenders import Clock, Drafting
from bench.peers.layout import write_conditional


class _NeverStop:
    def add_eos_token_ids(self, ids: object) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


class _Tokenizer:
    """All that the batch generator asks of one."""

    stopping_criteria = _NeverStop()


class Adapter:
    """A loaded target, with its drafter unless drafts is 0."""

    def __init__(self, model: str, drafts: int | None) -> None:
        assert drafts is not None
        with tempfile.TemporaryDirectory() as folder:
            write_conditional(Path(model), Path(folder))
            self.model = load_model(Path(folder))
        self.drafts = drafts
        self.drafter = None
        self.options: dict[str, object] = {}
        if drafts:
            self.drafter, kind = load_drafter(str(Path(model) / "drafter"))
            self.options = {
                "draft_model": self.drafter,
                "draft_kind": kind,
                "draft_block_size": drafts + 1,
            }
        self.versions = {"mlx_vlm": version("mlx-vlm"), "mlx": mx.__version__}

    def ways(self, batch: int) -> list[str]:
        """Return the ways to run a batch of that size."""
        return ["BatchGenerator", "generate_step"] if batch == 1 else ["BatchGenerator"]

    def run(
        self, prompts: list[list[int]], max_tokens: int, way: str, clock: Clock
    ) -> Drafting | None:
        """Generate."""
        if way == "generate_step":
            self._run_single(prompts[0], max_tokens, clock)
        else:
            self._run_batch(prompts, max_tokens, clock)
        return self._drafting(len(prompts), max_tokens)

    def _run_single(self, prompt: list[int], max_tokens: int, clock: Clock) -> None:
        steps = generate_step(
            mx.array([prompt]),
            self.model,
            None,
            None,
            max_tokens=max_tokens,
            temperature=0.0,
            **self.options,
        )
        with wired_limit(self.model, [generation_stream]):
            for token, _ in steps:
                clock.emit(0, [int(token)])

    def _run_batch(self, prompts: list[list[int]], max_tokens: int, clock: Clock) -> None:
        generator = BatchGenerator(
            self.model.language_model,
            _Tokenizer(),
            max_tokens=max_tokens,
            greedy_sampling=True,
            compute_logprobs=False,
            **self.options,
        )
        embedded = [self.model.get_input_embeddings(mx.array([ids])).to_dict() for ids in prompts]
        given = [{k: v for k, v in row.items() if v is not None} for row in embedded]
        rows = {uid: row for row, uid in enumerate(generator.insert(prompts, prompt_kwargs=given))}
        while generator.has_work:
            for response in generator.next()[1]:
                if response.token is not None:
                    clock.emit(rows[response.uid], [int(response.token)])
        generator.close()

    def _drafting(self, rows: int, max_tokens: int) -> Drafting | None:
        """Read the drafter's own log: accepted drafts of each round, the mean over its rows."""
        if self.drafter is None:
            return None
        drafting, left = Drafting(), max_tokens - 1
        for mean in self.drafter.accept_lens:
            accepted = int(mean)
            if accepted != mean:
                raise ValueError(f"rows of one round differ: {mean} drafts accepted on average")
            drafting.add_round(min(self.drafts, left), min(accepted, left), rows)
            left -= accepted + 1
        return drafting
