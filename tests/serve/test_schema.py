"""Requests made from the server's own OpenAPI description, sound and unsound: never a 5xx."""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.serve.process import ServerProcess

EXAMPLES = 40  # per endpoint


def cheap(path: str, body: Any) -> Any:
    """Return a body that asks for little of the model that is there.

    It is as sound as it was, or sounder: what a schema cannot say of prompts and messages is put
    right, so that requests reach the engine.
    """
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str | None):
        body["model"] = "builtin"
    if path.startswith("/api/"):
        return _cheap_for_ollama(body)
    for name, most in (("max_tokens", 2), ("max_completion_tokens", 2), ("n", 3)):
        if isinstance(body.get(name), int | float) and body[name] > most:
            body[name] = most
    if body.get("max_tokens") is None:
        body["max_tokens"] = 2
    if "prompt" in body:
        body["prompt"] = _prompt(body["prompt"])
        body.pop("best_of", None)
    for message in body["messages"] if isinstance(body.get("messages"), list) else []:
        if isinstance(message, dict) and message.get("content", 1) is None:
            message["content"] = "a"
    return body


def _cheap_for_ollama(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without what this model cannot do, and with few tokens to generate."""
    options = body.get("options")
    if options is None or isinstance(options, dict):
        body["options"] = {**(options or {}), "num_predict": 2}
    if isinstance(body.get("keep_alive"), str):
        body["keep_alive"] = "5m"
    for name in ("images", "suffix", "template", "context", "tools", "think"):
        if isinstance(body.get(name), str | list | bool):
            del body[name]
    for message in body["messages"] if isinstance(body.get("messages"), list) else []:
        if isinstance(message, dict) and isinstance(message.get("images"), list):
            del message["images"]
    return body


def _prompt(prompt: Any) -> Any:
    if type(prompt) is int:
        return prompt % 4096
    if isinstance(prompt, list):
        return [_prompt(item) for item in prompt[:3]] or "a"
    return prompt or "a"


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_nothing_makes_it_fail(server: ServerProcess, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.hook("map_body")(lambda context, body: cheap(context.operation.path, body))
    seen: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            response = case.call()
            seen[response.status_code] += 1
            case.validate_response(response, checks=[not_a_server_error])

        with suppress(Unsatisfiable):  # an endpoint without a body has nothing that is unsound
            ask()
    print(f"{sum(seen.values())} requests, by status: {dict(seen)}")
    assert seen[200 if mode is GenerationMode.POSITIVE else 400] > EXAMPLES // 2
    assert "Traceback" not in server.said()
