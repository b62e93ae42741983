"""transformers with its assistant, one row at a time, in the weights' own type.

The attention mask is given: without it, generate takes token 0 for padding and hides it. Each round
puts its tokens into a streamer, which is what counts rounds here.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from bench.peers.contenders import Clock, Drafting


class _Rounds:
    """A streamer: the prompt comes first, then the first token, then one call per round."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.counts: list[int] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        tokens = value.flatten().tolist()
        if not self._prompt:
            self.clock.emit(0, tokens)
            self.counts.append(len(tokens))
        self._prompt = False

    def end(self) -> None:
        pass


class Adapter:
    """A loaded target, with its assistant unless drafts is 0."""

    def __init__(self, model: str, drafts: int | None) -> None:
        assert drafts is not None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.drafts = drafts
        self.model = _load(Path(model))
        self.assistant = None
        if drafts:
            self.assistant = _load(Path(model) / "drafter")
            config = self.assistant.generation_config
            config.num_assistant_tokens = drafts
            config.num_assistant_tokens_schedule = "constant"
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    def ways(self, batch: int) -> list[str]:
        """Return the ways to run a batch of that size."""
        return ["generate"] if batch == 1 else []

    @torch.no_grad()
    def run(
        self, prompts: list[list[int]], max_tokens: int, way: str, clock: Clock
    ) -> Drafting | None:
        """Generate."""
        ids = torch.tensor(prompts)
        rounds = _Rounds(clock)
        assisted = {} if self.assistant is None else {"assistant_model": self.assistant}
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            streamer=rounds,
            **assisted,
        )
        if self.assistant is None:
            return None
        drafting, left = Drafting(), max_tokens - 1
        for count in rounds.counts[1:]:
            drafting.add_round(min(self.drafts, max(left - 1, 0)), count - 1)
            left -= count
        return drafting


def _load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    missing = set(info["missing_keys"]) - {"lm_head.weight"}
    if missing:
        raise ValueError(
            f"{folder} is not stored as transformers stores it; it lacks {min(missing)}"
        )
    model.generation_config.eos_token_id = None
    return model.eval()
