"""A server whose model says what the last user message says: `python -m tests.serve.echo`.

Everything is the program's own, engine, drafter and command line included; a logits processor of
each request makes the next token of the script by far the best, the end of the turn after it. What
a grammar forbids stays forbidden. A special token in a message is one in the script; <unk> makes
the processor fail there.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from gemma_mtp_mlx.api import Pair
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.prompts import Prompt, Prompts
from gemma_mtp_mlx.request import Request
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.serve import server
from gemma_mtp_mlx.serve.served import Served
from tests.gemma_text import SPECIAL

END, FAIL = SPECIAL.index("<turn|>"), SPECIAL.index("<unk>")
MUCH = 1000.0


def script_of(prompt: Sequence[int], user: Sequence[int]) -> list[int]:
    """Return what the last user turn of a prompt says. user: how such a turn begins."""
    begin = max(at for at in range(len(prompt)) if list(prompt[at : at + len(user)]) == list(user))
    said = list(prompt[begin + len(user) :])
    return said[: said.index(END)] if END in said else said


class Echo(Prompts):
    """Prompts whose requests say their last user message."""

    def request(self, prompt: Prompt, params: SamplingParams, *, sections: bool = False) -> Request:
        """Return a request that follows its script."""
        ids = self.encode(prompt, thinking=params.thinking)
        assert self.tokenizer is not None
        user = self.tokenizer.encode("<|turn>user\n", add_special_tokens=False)
        script = [*script_of(ids, user), END]

        def follow(tokens: mx.array, logits: mx.array) -> mx.array:
            place = min(tokens.size - len(ids), len(script) - 1)
            if script[place] == FAIL:
                raise RuntimeError("this was in the script")
            return mx.where(mx.arange(logits.shape[-1]) == script[place], MUCH, logits)

        with_script = replace(params, logits_processors=(follow,))
        return super().request(ids, with_script, sections=sections)


def echoing(model: str | None, draft_model: str | None, *, fast: bool) -> tuple[Pair, Served]:
    """Load a pair as the server does, and give it a script."""
    pair, served = _load_served(model, draft_model, fast=fast)
    pair.prompts = Echo(pair.target.config, pair.tokenizer, pair.prompts.eos)
    return pair, served


_load_served = server.load_served

if __name__ == "__main__":
    server.load_served = echoing
    sys.exit(main(["serve", *sys.argv[1:]]))
