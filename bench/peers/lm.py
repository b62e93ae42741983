"""mlx_lm without a drafter (it cannot run this one): its batch generator and its single loop."""

from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.utils import load_model

from bench.peers.contenders import Clock


class Adapter:
    """A loaded target."""

    def __init__(self, model: str, drafts: int | None) -> None:
        self.model, _ = load_model(Path(model))
        self.versions = {"mlx_lm": mlx_lm.__version__, "mlx": mx.__version__}

    def ways(self, batch: int) -> list[str]:
        """Return the ways to run a batch of that size."""
        return ["BatchGenerator", "generate_step"] if batch == 1 else ["BatchGenerator"]

    def run(self, prompts: list[list[int]], max_tokens: int, way: str, clock: Clock) -> None:
        """Generate."""
        if way == "generate_step":
            with wired_limit(self.model, [generation_stream]):
                for token, _ in generate_step(
                    mx.array(prompts[0]), self.model, max_tokens=max_tokens
                ):
                    clock.emit(0, [int(token)])
            return
        generator = BatchGenerator(self.model, max_tokens=max_tokens, stop_tokens=[])
        rows = {uid: row for row, uid in enumerate(generator.insert(prompts))}
        while clock.missing(max_tokens):
            for response in generator.next()[1]:
                clock.emit(rows[response.uid], [int(response.token)])
        generator.close()
