"""The text layer over the engine: prompts in, pieces of text out, many requests at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma_mtp_mlx.depth import AutoDepth, DepthState, FixedDepth
from gemma_mtp_mlx.engine import Engine, Event
from gemma_mtp_mlx.memory import Limits
from gemma_mtp_mlx.outcome import Logprob
from gemma_mtp_mlx.prompt_cache import read_prompt_cache, write_prompt_cache
from gemma_mtp_mlx.prompts import Prompt, Prompts
from gemma_mtp_mlx.request import Request, Stats
from gemma_mtp_mlx.round import Models
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.sections import Piece
from gemma_mtp_mlx.weights import fingerprint


@dataclass(frozen=True, slots=True)
class Result:
    """What a request produced. tokens: all generated ids, the EOS id included if one ended it.

    finish_reason: "stop", "length", "cancelled" or "error"; error says what went wrong.
    logprobs: one per token if the settings asked for them.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    logprobs: list[Logprob]
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one prompt's output. result: set in the prompt's last chunk only.

    index: which of the prompts given together; 0 for a single one. logprobs: of the tokens, if
    asked for; pieces: the text by sections, if asked for.
    """

    index: int
    text: str
    tokens: list[int]
    result: Result | None
    request: Request
    logprobs: list[Logprob] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


class Session:
    """A running batch: requests join and leave while others go on, prompts reuse each other's work.

    depth: how many tokens to draft per round.
    Raises: ValueError if the memory asked for is not there.
    """

    def __init__(
        self,
        models: Models,
        prompts: Prompts,
        depth: AutoDepth | FixedDepth,
        limits: Limits | None = None,
    ) -> None:
        self.prompts = prompts
        self.engine = Engine(models, depth, limits)
        self._target = models.target
        self._indices: dict[Request, int] = {}

    @property
    def depth(self) -> DepthState:
        """What the depth controller believes and does."""
        return self.engine.depth.state()

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, index: int = 0
    ) -> Request:
        """Queue a prompt. Returns its handle; `step` gives its output under this index.

        Raises: ValueError for bad input or one that can never fit.
        """
        return self.enqueue(self.prompts.request(prompt, params or SamplingParams()), index)

    def enqueue(self, request: Request, index: int = 0) -> Request:
        """Queue a request that `prompts.request` has made, and return it; see `submit`."""
        self.engine.submit(request)
        self._indices[request] = index
        return request

    def cancel(self, request: Request) -> None:
        """End a request; its last chunk comes with the next step."""
        self.engine.cancel(request)

    def step(self) -> list[Chunk]:
        """Run until there is something new. Returns it; nothing if there is nothing to do."""
        return [self._chunk(event) for event in self.engine.step()] if self.engine.busy else []

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Yield one prompt's output as it is generated. Closing the iterator ends the request."""
        return self.stream_batch([prompt], params)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Chunk]:
        """Yield the output of several prompts as it is generated; chunks carry the prompt's index.

        params: one for all, or one per prompt. Closing the iterator ends the requests.
        Raises: ValueError for bad input, before anything is generated.
        """
        settings = per_prompt(params, len(prompts))
        requests = [self.prompts.request(p, s) for p, s in zip(prompts, settings, strict=True)]
        return self.stream_requests(requests)

    def stream_requests(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """Yield the output of requests that `prompts.request` has made, as `stream_batch` does."""
        for request in requests:
            self.engine.seating.check(request)
        return self._stream(requests)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Result:
        """Generate from one prompt."""
        return self.generate_batch([prompt], params)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Generate from several prompts. Raises the first error that ended one of them."""
        return collect(self.stream_batch(prompts, params), len(prompts))

    def save_prompt_cache(self, prompt: Prompt, file: str | Path) -> int:
        """Write a prompt's keys and values to a file, up to its last whole chunk.

        Returns: the number of tokens that were written.
        Raises: ValueError if the prompt is shorter than a chunk or nothing may be kept.
        """
        tokens = self.prompts.encode(prompt)
        if len(tokens) < self.engine.chunk:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; a prompt cache holds whole chunks of "
                f"{self.engine.chunk}"
            )
        self.generate(tokens, SamplingParams(max_tokens=1))
        saved = self.engine.save_prompt(tokens)
        if saved is None:
            raise ValueError("the memory budget leaves no room to keep a prompt; raise it")
        write_prompt_cache(Path(file), saved, fingerprint(self._target, self._target.config))
        return len(saved.tokens)

    def load_prompt_cache(self, file: str | Path) -> int:
        """Read a prompt cache, for all prompts that begin alike. Returns its number of tokens.

        Raises: ValueError if it belongs to another model or does not fit.
        """
        config = self._target.config
        saved = read_prompt_cache(
            Path(file), fingerprint(self._target, self._target.config), config, self.engine.chunk
        )
        self.engine.load_prompt(saved)
        return len(saved.tokens)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        mine = set(requests)
        for index, request in enumerate(requests):
            self.enqueue(request, index)
        try:
            while mine:
                for chunk in self.step():
                    if chunk.request in mine:
                        if chunk.result is not None:
                            mine.remove(chunk.request)
                        yield chunk
        finally:
            for request in mine:
                self.cancel(request)

    def _chunk(self, event: Event) -> Chunk:
        request = event.request
        text = "" if request.text is None else request.text.take()
        pieces = [] if request.sections is None else request.sections.take()
        result = None
        index = self._indices[request]
        if event.finish_reason is not None:
            del self._indices[request]
            reader = request.text or request.sections
            whole = "" if reader is None else reader.text
            result = Result(
                whole,
                request.tokens,
                event.finish_reason,
                request.stats,
                request.logprobs,
                request.error,
            )
        return Chunk(index, text, event.tokens, result, request, event.logprobs, pieces)


def collect(chunks: Iterable[Chunk], count: int) -> list[Result]:
    """Wait for the results of `count` prompts, in their order. Raises what ended one of them."""
    done = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
    for result in done.values():
        if result.error is not None:
            raise result.error
    return [done[index] for index in range(count)]


def per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """Return one setting per prompt. Raises: ValueError if there are not that many."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"{len(params)} sampling settings for {count} prompts; give one or {count}"
        )
    return params
