"""The soak's requests: every endpoint and setting, mixed at random, each with one right answer.

A body is JSON without `stream`, which whoever asks decides. Every job is greedy or has a seed, so
its answer is decided by the body alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.serving.load import contents
from gemma_mtp_mlx.prompt_kinds import KINDS

OPENAI = ("/v1/chat/completions", "/v1/completions")
OLLAMA = ("/api/chat", "/api/generate")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
_STOPS = ["\n", "self", "):", " return", "the"]


@dataclass(frozen=True, slots=True)
class Job:
    """A request. path: of its endpoint."""

    number: int
    path: str
    body: dict[str, Any]

    def asked(self, *, stream: bool) -> dict[str, Any]:
        """Return the body to send."""
        if stream and self.path in OPENAI:
            return {**self.body, "stream": True, "stream_options": {"include_usage": True}}
        return {**self.body, "stream": stream}


def make_jobs(count: int, model: str, *, ollama: bool, seed: int = 1) -> list[Job]:
    """Return that many different jobs, the same ones for the same arguments."""
    random = np.random.RandomState(seed)
    texts = contents(KINDS)
    paths = OPENAI + OLLAMA if ollama else OPENAI
    return [
        _job(random, number, paths[number % len(paths)], texts, model) for number in range(count)
    ]


def _job(
    random: np.random.RandomState, number: int, path: str, texts: list[str], model: str
) -> Job:
    text = texts[random.randint(len(texts))][: int(random.choice([30, 80, 200, 600]))]
    stop = [str(random.choice(_STOPS))] if random.rand() < 0.25 else []
    tokens = int(random.choice([1, 4, 16, 32, 48]))
    sampled = random.rand() < 0.6
    settings: dict[str, Any] = {"temperature": 0.0, "seed": number}
    if sampled:
        settings |= {"temperature": float(random.choice([0.6, 0.9, 1.3]))}
        settings |= {"top_p": float(random.choice([0.8, 0.95, 1.0]))}
    if random.rand() < 0.2:
        settings |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    by_schema = random.rand() < 0.15
    if path in OPENAI:
        body = settings | {"model": model, "max_tokens": tokens}
        if stop:
            body["stop"] = stop
        body |= _openai(random, path, by_schema)
    else:
        options = settings | {"num_predict": tokens} | ({"stop": stop} if stop else {})
        body = {"model": model, "options": options} | ({"format": SCHEMA} if by_schema else {})
    if path.endswith(("/chat/completions", "/chat")):
        return Job(number, path, body | {"messages": [{"role": "user", "content": text}]})
    return Job(number, path, body | {"prompt": text})


def _openai(random: np.random.RandomState, path: str, by_schema: bool) -> dict[str, Any]:
    """Return settings that only OpenAI's endpoints have."""
    body: dict[str, Any] = {}
    if random.rand() < 0.2:
        body["n"] = int(random.randint(2, 4))
    if random.rand() < 0.15:
        body["logit_bias"] = {"40": 1.5, "300": -2.0}
    chat = path == "/v1/chat/completions"
    if random.rand() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    if by_schema and chat:
        wanted = {"name": "item", "schema": SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return body


def bad_requests(model: str, *, ollama: bool) -> list[tuple[str, Any]]:
    """Return what a server must refuse as its sender's mistake: path and body."""
    chat, completions = OPENAI
    said = [{"role": "user", "content": "Hello"}]
    refused: list[tuple[str, Any]] = [
        (chat, b'{"model": '),
        (chat, b"\xff\xfe\x00"),
        (chat, {"model": model}),
        (chat, {"model": model, "messages": []}),
        (chat, {"model": model, "messages": "Hello"}),
        (chat, {"model": f"{model}-none", "messages": said}),
        (chat, {"model": model, "messages": said, "max_tokens": -1}),
        (chat, {"model": model, "messages": said, "temperature": "hot"}),
        (chat, {"model": model, "messages": said, "n": 0}),
        (chat, {"model": model, "messages": said, "top_logprobs": 21, "logprobs": True}),
        (completions, {"model": model, "prompt": ""}),
        (completions, {"model": model, "prompt": "Hello", "top_p": 7}),
        (completions, {"model": model, "prompt": "Hello", "max_tokens": "many"}),
        ("/v1/nothing", {}),
    ]
    if ollama:
        refused += [
            ("/api/chat", {"model": model, "messages": "Hello"}),
            ("/api/generate", {"model": f"{model}-none", "prompt": "Hello"}),
        ]
    return refused
