"""The ollama package drives every endpoint and field, and gets what the engine says."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from mlx.utils import tree_flatten
from ollama import AsyncClient, Client, ResponseError
from openai import OpenAI

from gemma_mtp_mlx import Pair, SamplingParams, __version__
from gemma_mtp_mlx.session import Result
from tests.serve.process import ServerProcess
from tests.serve.wire import open_request, read_until, request, wait_until

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": PROMPT}]
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
GREEDY = {"temperature": 0, "num_predict": 16}
SAMPLED = {"temperature": 0.9, "seed": 2**32 - 1, "num_predict": 16, "top_k": 7, "min_p": 0.01}


@pytest.fixture
def asks(server: ServerProcess) -> Iterator[Client]:
    with Client(host=server.url) as made:
        yield made


def plain(pair: Pair, prompt: Any = PROMPT, **settings: Any) -> Result:
    """What the engine says to a prompt without a drafter."""
    params = SamplingParams(**{**DEFAULTS, "max_tokens": 16, **settings})
    return pair.generate(prompt, params, num_draft_tokens=0)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
@pytest.mark.parametrize("stream", [False, True])
def test_text_is_the_engines(
    asks: Client, client: OpenAI, pair: Pair, options: dict[str, Any], stream: bool
) -> None:
    settings = {name: value for name, value in options.items() if name != "num_predict"}
    expected = plain(pair, **settings)
    chat = asks.chat(model="builtin", messages=MESSAGES, options=options, stream=stream)
    made = asks.generate(model="builtin", prompt=PROMPT, options=options, stream=stream)
    if stream:
        chat, made = list(chat), list(made)
        texts = "".join(p.message.content for p in chat), "".join(p.response for p in made)
        assert [part.done for part in chat] == [False] * (len(chat) - 1) + [True]
        assert len(chat) > 2 and chat[-1].message.content == made[-1].response == ""
        chat, made = chat[-1], made[-1]
    else:
        texts = chat.message.content, made.response
    assert texts == (expected.text, expected.text)
    assert chat.done_reason == made.done_reason == expected.finish_reason
    assert chat.eval_count == made.eval_count == len(expected.tokens)
    assert chat.prompt_eval_count == len(pair.encode(PROMPT))
    assert list(made.context) == [*pair.encode(PROMPT), *expected.tokens]
    sent = DEFAULTS | settings
    same = client.chat.completions.create(
        model="builtin",
        messages=MESSAGES,
        max_tokens=16,
        temperature=sent.pop("temperature"),
        seed=sent.pop("seed", None),
        top_p=sent.pop("top_p"),
        extra_body=sent,
    )
    assert same.choices[0].message.content == expected.text


def test_asyncio_clients_get_the_same(server: ServerProcess, pair: Pair) -> None:
    async def ask(client: AsyncClient, seed: int) -> str:
        options = {"seed": seed, "num_predict": 12}
        if seed % 2:
            said = await client.chat(model="builtin", messages=MESSAGES, options=options)
            return str(said.message.content)
        parts = await client.generate(model="builtin", prompt=PROMPT, options=options, stream=True)
        return "".join([part.response async for part in parts])

    async def run() -> list[str]:
        async with AsyncClient(host=server.url) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(6)))

    expected = [plain(pair, seed=seed, max_tokens=12).text for seed in range(6)]
    assert asyncio.run(run()) == expected


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "cd"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5}
LAST_64 = {f"{kind}_context_size": 64 for kind in ("repetition", "presence", "frequency")}
PENALTY_OPTIONS = {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5}
# What a client sends beside a seed, and what the engine is given for it.
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),  # the model has no settings of its own: Ollama's
    ({"options": {"top_k": 0, "top_p": 1.0}}, {"top_k": 0, "top_p": 1.0}),
    ({"options": {"top_k": -1, "top_p": 2.0}}, {"top_k": 0, "top_p": 1.0}),
    ({"options": {"stop": ["nothing", "a"]}}, {"stop": ("nothing", "a")}),
    ({"options": {"seed": 2**32 + 5}}, {"seed": 5}),
    ({"options": PENALTY_OPTIONS}, PENALTIES | LAST_64),
    (
        {"options": {"repeat_penalty": 1.3, "repeat_last_n": 3}},
        {"repetition_penalty": 1.3, "repetition_context_size": 3},
    ),
    (
        {"options": {"repeat_penalty": 1.3, "repeat_last_n": -1}},
        {"repetition_penalty": 1.3, "repetition_context_size": 4096},
    ),
    ({"options": PENALTY_OPTIONS | {"repeat_last_n": 0}}, {}),
    ({"options": {"draft_num_predict": 0}}, {}),
    ({"options": {"draft_num_predict": 64}}, {}),
    ({"options": {"num_ctx": 8, "num_gpu": 1, "use_mmap": True, "mirostat": 2}}, {}),
    ({"options": {"temperature": None}}, {}),
    ({"format": "json"}, {"json_schema": {}}),
    ({"format": SCHEMA}, {"json_schema": SCHEMA}),
    ({"format": ""}, {}),
    ({"think": False}, {}),
    ({"keep_alive": "1h30m"}, {}),
    ({"keep_alive": -1}, {}),
]


@pytest.mark.parametrize("sent, meant", FIELDS)
def test_fields_mean_what_they_say(
    asks: Client, pair: Pair, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    options = {"seed": 3, "num_predict": 12} | sent.get("options", {})
    expected = plain(pair, **{"seed": 3, "max_tokens": 12, **meant})
    chat = asks.chat(model="builtin", messages=MESSAGES, **{**sent, "options": options})
    made = asks.generate(model="builtin", prompt=PROMPT, **{**sent, "options": options})
    assert (chat.message.content, chat.done_reason) == (expected.text, expected.finish_reason)
    assert (made.response, made.eval_count) == (expected.text, len(expected.tokens))


def test_a_conversation_goes_on(asks: Client, pair: Pair) -> None:
    said: Any = asks.generate(model="builtin", prompt="import", system="Python", options=GREEDY)
    first = pair.encode("import", system="Python")
    expected = plain(pair, first, temperature=0)
    assert said.response == expected.text
    more = asks.generate(model="builtin", prompt=PROMPT, context=said.context, options=GREEDY)
    ids = [*first, *expected.tokens, *pair.encode(PROMPT)[1:]]  # a text begins once
    assert more.response == plain(pair, ids, temperature=0).text
    assert list(more.context)[: len(ids)] == ids and more.prompt_eval_count == len(ids)
    messages = [
        {"role": "System", "content": "Python"},
        {"role": "user", "content": "import"},
        {"role": "assistant", "content": "import os", "thinking": "what of it"},
        {"role": "user", "content": PROMPT},
    ]
    chat = asks.chat(model="builtin", messages=messages, options=GREEDY)
    known = [{**message, "role": message["role"].lower()} for message in messages]
    assert chat.message.content == plain(pair, known, temperature=0).text


def test_a_raw_prompt_is_continued(asks: Client, pair: Pair) -> None:
    made = asks.generate(model="builtin", prompt=PROMPT, raw=True, options=GREEDY)
    ids = pair.encode(PROMPT, template=False)
    assert made.response == plain(pair, ids, temperature=0).text
    assert made.context is None


@pytest.mark.parametrize("raw", [False, True])
def test_logprobs_are_the_engines(asks: Client, pair: Pair, raw: bool) -> None:
    ids = pair.encode(PROMPT, template=not raw)
    result = plain(pair, ids, temperature=0, logprobs=3)
    settings: Any = {"model": "builtin", "options": GREEDY, "logprobs": True, "top_logprobs": 3}
    answers: list[Any] = [
        asks.generate(prompt=PROMPT, raw=raw, **settings).logprobs,
        [
            entry
            for part in asks.generate(prompt=PROMPT, raw=raw, stream=True, **settings)
            for entry in part.logprobs or []
        ],
    ]
    if not raw:
        answers.append(asks.chat(messages=MESSAGES, **settings).logprobs)
    for entries in answers:
        assert "".join(entry.token for entry in entries) == result.text
        assert [entry.logprob for entry in entries] == [each.logprob for each in result.logprobs]
        assert [[other.logprob for other in entry.top_logprobs] for entry in entries] == [
            [value for _, value in each.top] for each in result.logprobs
        ]


def test_times_add_up(server: ServerProcess) -> None:
    said = {"model": "builtin", "prompt": PROMPT, "options": {"num_predict": 1, "mirostat": 1}}
    for predicted in (1, 24):
        said["options"] = {"num_predict": predicted, "mirostat": 1, "num_ctx": 4}
        status, headers, data = request(server.port, "/api/generate", json.dumps(said).encode())
        assert status == 200 and headers["content-type"] == "application/x-ndjson"
        *parts, last = map(json.loads, data.splitlines())
        names = [f"{what}_duration" for what in ("load", "prompt_eval", "eval")]
        times = [last[name] for name in names]
        assert all(type(time) is int and time > 0 for time in times)
        assert abs(sum(times) - last["total_duration"]) <= len(times)
        assert last["eval_count"] == predicted
        assert 0 <= last["draft_n_accepted"] <= last["draft_n"]
        # The first token is the prompt's; of the last round a token may be one too many.
        assert last["draft_n_accepted"] + last["draft_rounds"] in (predicted - 1, predicted)
        assert last["ignored_options"] == ["mirostat"]
        for part in (*parts, last):
            moment = datetime.fromisoformat(part["created_at"])
            assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
            assert part["model"] == "builtin"
    status, headers, data = request(
        server.port, "/api/generate", json.dumps({**said, "stream": False}).encode()
    )
    assert headers["content-type"] == "application/json"
    assert json.loads(data)["done"]


def test_no_drafts_if_told_so(server: ServerProcess) -> None:
    for most, drafted in ((0, False), (3, True)):
        said = {"model": "builtin", "messages": MESSAGES, "stream": False}
        said["options"] = {"num_predict": 24, "draft_num_predict": most, "temperature": 0}
        _, _, data = request(server.port, "/api/chat", json.dumps(said).encode())
        assert (json.loads(data)["draft_n"] > 0) == drafted


def test_asked_for_nothing_the_model_is_there(asks: Client) -> None:
    for keep_alive in (None, 0, "5m"):
        chat = asks.chat(model="builtin", keep_alive=keep_alive)
        made = asks.generate(model="builtin:latest", prompt="", keep_alive=keep_alive)
        assert (chat.done_reason, chat.message.content, chat.done) == ("load", "", True)
        assert (made.done_reason, made.response, made.model) == ("load", "", "builtin:latest")
    assert [model.model for model in asks.ps().models] == ["builtin:latest"]


def test_the_model_is_described(asks: Client, server: ServerProcess, pair: Pair) -> None:
    (listed,) = asks.list().models
    (loaded,) = asks.ps().models
    shown = asks.show("builtin")
    assert listed.model == loaded.model == loaded.name == "builtin:latest"
    assert listed.digest == loaded.digest and len(str(listed.digest)) >= 12
    assert listed.details == loaded.details == shown.details
    assert (listed.details.family, listed.details.families) == ("gemma4", ["gemma4"])
    assert (listed.details.parameter_size, listed.details.quantization_level) == ("5.6M", "BF16")
    assert listed.size == pair_bytes(pair)
    assert loaded.size == loaded.size_vram == listed.size + server.health()["kv_bytes"]
    assert loaded.context_length == 4096
    assert loaded.expires_at.year > datetime.now(UTC).year + 100
    assert listed.modified_at == shown.modified_at
    assert shown.capabilities == ["completion"]
    assert shown.template == pair.tokenizer.chat_template
    assert shown.modelinfo["general.architecture"] == "gemma4"
    assert shown.modelinfo["gemma4.context_length"] == 4096
    assert shown.modelinfo["general.parameter_count"] == listed.size / 2
    assert [line.split() for line in shown.parameters.splitlines()] == [
        [name, str(value)] for name, value in DEFAULTS.items()
    ]
    assert json.loads(request(server.port, "/api/version")[2]) == {"version": __version__}
    assert request(server.port, "/")[2] == b"mlx-gemma-mtp is running"
    assert request(server.port, "/", method="HEAD")[0] == 200


def pair_bytes(pair: Pair) -> int:
    return sum(weight.nbytes for _, weight in tree_flatten(pair.target.parameters()))


NAMES = "gemma4:e2b, gemma4:e4b, gemma4:12b, gemma4:26b, gemma4:31b"


@pytest.mark.parametrize(
    "name, says",
    [
        ("gemma4:27b", NAMES),
        ("llama3.2", NAMES),
        ("gemma4", "--model gemma4:e4b"),
        ("gemma4:latest", "--model gemma4:e4b"),
        ("gemma4:26b-a4b", "--model gemma4:26b-a4b"),
        ("google/gemma-4-E2B-it", "--model google/gemma-4-E2B-it"),
        ("../builtin", "no name of a repository"),
    ],
)
def test_another_model_is_not_found(asks: Client, name: str, says: str) -> None:
    for call in (asks.show, lambda model: asks.chat(model=model, messages=MESSAGES)):
        with pytest.raises(ResponseError, match=says) as caught:
            call(name)
        assert caught.value.status_code == 404
        assert f"model {name!r} not found" in caught.value.error
        assert "this server serves builtin:latest" in caught.value.error


@pytest.mark.parametrize(
    "sent, says",
    [
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"num_predict": "many"}}, "options.num_predict"),
        ({"options": {"top_p": 0}}, "options.top_p"),
        ({"options": {"draft_num_predict": -1}}, "options.draft_num_predict"),
        ({"options": {"stop": [""]}}, "stop"),
        ({"format": {"type": "nothing"}}, "json_schema"),
        ({"think": True}, "'builtin' does not support thinking"),
        ({"think": "very"}, "think"),
        ({"keep_alive": "soon"}, "keep_alive: a duration is"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_what_is_refused_is_named(asks: Client, sent: dict[str, Any], says: str) -> None:
    for call in (
        lambda: asks.chat(model="builtin", messages=MESSAGES, **sent),
        lambda: list(asks.generate(model="builtin", prompt=PROMPT, stream=True, **sent)),
    ):
        with pytest.raises(ResponseError, match=says) as caught:
            call()
        assert caught.value.status_code == 400


@pytest.mark.parametrize(
    "sent, says",
    [
        ({"images": [b"png"]}, "text only"),
        ({"suffix": "return"}, "insert"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"raw": True, "system": "Python"}, "raw mode"),
        ({"raw": True, "context": [2]}, "raw mode"),
        ({"context": [10**6]}, "1000000 is not in the vocabulary"),
        ({"prompt": "x" * 10**5}, "context"),
    ],
)
def test_prompts_that_cannot_be_read(asks: Client, sent: dict[str, Any], says: str) -> None:
    with pytest.raises(ResponseError, match=says) as caught:
        asks.generate(**{"model": "builtin", "prompt": PROMPT, **sent})
    assert caught.value.status_code == 400


@pytest.mark.parametrize(
    "message, says",
    [
        ({"role": "user", "content": "a", "images": [b"png"]}, "messages.0.images.*text only"),
        ({"role": "robot", "content": "a"}, "messages.0.role"),
        ({"role": "tool", "content": "a", "tool_name": "f"}, "unknown role"),
    ],
)
def test_messages_that_cannot_be_read(asks: Client, message: Any, says: str) -> None:
    with pytest.raises(ResponseError, match=says) as caught:
        asks.chat(model="builtin", messages=[message])
    assert caught.value.status_code == 400


def test_who_leaves_frees_the_row(server: ServerProcess) -> None:
    said = {"model": "builtin", "prompt": "x = 1\ny = 2", "options": {"seed": 1}}  # thousands
    with open_request(
        server.port, json.dumps(said).encode(), {"x-request-id": "left-1"}, "/api/generate"
    ) as connection:
        assert b'"done":false' in read_until(connection, b"\n{")
    assert wait_until(lambda: server.health()["running"] == 0)
    (entry,) = [entry for entry in server.entries() if entry["id"] == "left-1"]
    assert entry["client_disconnected"] and entry["finish_reasons"] == ["abort"]


def test_what_is_not_offered_is_not_found(asks: Client) -> None:
    with pytest.raises(ResponseError) as caught:
        asks.embed(model="builtin", input="a")
    assert caught.value.status_code == 404 and caught.value.error == "Not Found"
