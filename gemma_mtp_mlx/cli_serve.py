"""The command that serves: `serve`."""

import importlib
import json
import math
from typing import Annotated, Any

import typer

from gemma_mtp_mlx.options import (
    MOST_DRAFTS,
    DraftModel,
    DraftTokens,
    Fast,
    Model,
    opt,
    read_depth,
)
from gemma_mtp_mlx.progress import say

ROWS = 8
EXTRA = ("fastapi", "prometheus_client", "pydantic", "uvicorn")
KEY = "MLX_GEMMA_MTP_API_KEY"
METHODS = ("mtp", "gemma4_mtp")  # two names of the same in vLLM


def serve(
    model: Model = None,
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = "auto",
    fast: Fast = False,
    host: Annotated[str, opt("ADDRESS", "Where to listen; this machine only by default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="The port, Ollama's if not; 0 takes any free one."
        ),
    ] = 11434,
    max_batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers that run at a time, at most.")
    ] = ROWS,
    max_queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answers that wait, at most.")
    ] = 64,
    kv_budget: Annotated[
        float | None, opt("GB", "Memory for keys and values; half of what is left if not given.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", envvar=KEY, help="What clients have to send."),
    ] = None,
    speculative_config: Annotated[
        str | None, opt("JSON", "Drafter and depth as vLLM's option of that name has them.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, opt("NAME", "A name this server is called by, or *; once or more.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, opt("ORIGIN", "A site whose pages may ask, or *; once or more.")
    ] = None,
) -> int:
    """Serve a model over HTTP, with OpenAI's and Ollama's endpoints; needs the extra `serve`."""
    drafts = read_depth(num_draft_tokens)
    if kv_budget is not None and not 0 < kv_budget < math.inf:
        raise ValueError(f"--kv-budget is {kv_budget}; it must be a number of GB above 0")
    if speculative_config is not None:
        if draft_model is not None or drafts is not None:
            raise ValueError(
                "--speculative-config says what --draft-model and --num-draft-tokens say; "
                "give either"
            )
        draft_model, drafts = read_speculative(speculative_config)
    if api_key == "":
        raise ValueError("--api-key is empty; give a key, or leave it out to ask for none")
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"serve needs {error.name}; install it with: pip install 'mlx-gemma-mtp[serve]'"
            ) from error
    from gemma_mtp_mlx.serve import server
    from gemma_mtp_mlx.serve.settings import Settings

    settings = Settings(
        host=host,
        max_batch=max_batch,
        max_queue=max_queue,
        api_key=api_key,
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
    )
    with server.bind(host, port) as listener:
        if model is None:
            say("No --model given: serving the small built-in pair, trained on Python code")
        pair, served = server.load_served(model, draft_model, fast=fast)
        budget = None if kv_budget is None else int(kv_budget * 1e9)
        return server.run(server.make_runner(pair, served, settings, drafts, budget), listener)


def read_speculative(text: str) -> tuple[str | None, int | None]:
    """Return the drafter and the depth, each None if not named, of vLLM's JSON.

    Raises: ValueError for what it does not mean here.
    """
    where = "--speculative-config"
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    known: dict[str, Any] = {"method": str, "model": str, "num_speculative_tokens": int}
    if not isinstance(given, dict):
        raise ValueError(f'{where} is an object, such as {{"method": "mtp"}}')
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where}: {key!r} is not known; use {', '.join(known)}")
        if type(value) is not known[key]:
            raise ValueError(f"{where}: {key} is {json.dumps(value)[:40]}; see vLLM")
    method = given.get("method", "mtp")
    if method not in METHODS:
        raise ValueError(f"{where}: there is no method {method!r} here; use {METHODS[0]}")
    depth = given.get("num_speculative_tokens")
    if depth is not None and not 0 <= depth <= MOST_DRAFTS:
        raise ValueError(f"{where}: num_speculative_tokens is {depth}; use 0 to {MOST_DRAFTS}")
    return given.get("model"), depth
