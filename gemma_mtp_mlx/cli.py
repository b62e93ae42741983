"""The command line: `mlx-gemma-mtp` generate, batch, convert, pull, inspect, ...

Text goes to stdout as it is generated, everything else to stderr. What a user can get wrong ends in
one line and exit code 2, requests that failed in 1. Importing mlx_lm takes seconds, so a command
imports what it needs when its options have been read.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_mtp_mlx import __version__, cli_models
from gemma_mtp_mlx.cli_chat import chat
from gemma_mtp_mlx.cli_convert import convert
from gemma_mtp_mlx.cli_doctor import doctor
from gemma_mtp_mlx.cli_inspect import inspect, verify
from gemma_mtp_mlx.cli_predict import predict
from gemma_mtp_mlx.cli_report import report as report_
from gemma_mtp_mlx.cli_serve import serve
from gemma_mtp_mlx.options import (
    NAME,
    DraftModel,
    DraftTokens,
    Fast,
    MinP,
    Model,
    NoTemplate,
    PromptFile,
    Seed,
    System,
    Temp,
    Think,
    ThinkingBudget,
    TopK,
    TopP,
    flag,
    load_pair,
    opt,
    read_depth,
    read_prompts,
    read_schema,
    text_or_file,
)
from gemma_mtp_mlx.progress import say

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
ROWS = 8

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Gemma 4 with its MTP drafter on MLX: the same tokens, in fewer passes.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A closed stdout ends it quietly with 1."""
    try:
        code = app(args=argv, prog_name=NAME, standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C
            say("interrupted")
        return code
    except typer.TyperException as error:
        return _fail(f"{error.format_message().rstrip('.')}; see {NAME} --help")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror or error}")
    except ValueError as error:
        return _fail(str(error))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None: ...


@app.command()
def generate(
    model: Model = None,
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = "auto",
    fast: Fast = False,
    prompt: Annotated[
        list[str] | None, opt("TEXT", "A prompt, or several.", "--prompt", "-p")
    ] = None,
    prompt_file: PromptFile = None,
    max_tokens: Annotated[int, opt("N", "Most tokens per prompt.", "--max-tokens", "-m")] = 256,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    repetition_penalty: Annotated[float, opt("X", "Divide recent tokens' logits by X.")] = 1.0,
    presence_penalty: Annotated[float, opt("X", "Take X off recent tokens' logits.")] = 0.0,
    frequency_penalty: Annotated[float, opt("X", "The same, each time they occur.")] = 0.0,
    penalty_context_size: Annotated[int, opt("N", "How many tokens are recent.")] = 20,
    system_prompt: System = None,
    raw: NoTemplate = False,
    thinking: Think = None,
    thinking_budget: ThinkingBudget = None,
    stop: Annotated[list[str] | None, opt("TEXT", "What ends the output, once or more.")] = None,
    json_schema: Annotated[str | None, opt("FILE|JSON", "A schema the text must follow.")] = None,
    regex: Annotated[str | None, opt("REGEX", "What the whole text must match.")] = None,
    grammar: Annotated[str | None, opt("FILE|TEXT", "The same, in Lark or GBNF.")] = None,
    prompt_cache_file: Annotated[Path | None, opt("FILE", "Made by cache-prompt.")] = None,
    logprobs: Annotated[int | None, opt("N", "Of each token and N others, with --json.")] = None,
    json: Annotated[bool, flag("Print one JSON object per prompt.", "--json")] = False,
    verbose: Annotated[bool, flag("Say more on stderr.", "--verbose")] = False,
) -> int:
    """Generate text from one prompt or several."""
    prompts = read_prompts(prompt or [], prompt_file)
    drafts = read_depth(num_draft_tokens)
    if logprobs is not None and not json:
        raise ValueError("--logprobs needs --json, which shows them")
    from gemma_mtp_mlx import SamplingParams, report
    from gemma_mtp_mlx import batch as runner
    from gemma_mtp_mlx.prompt_cache import cached_tokens

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        repetition_penalty=repetition_penalty,
        repetition_context_size=penalty_context_size,
        presence_penalty=presence_penalty,
        presence_context_size=penalty_context_size,
        frequency_penalty=frequency_penalty,
        frequency_context_size=penalty_context_size,
        logprobs=logprobs,
        thinking=thinking,
        thinking_budget=thinking_budget,
        json_schema=None if json_schema is None else read_schema(json_schema),
        regex=regex,
        grammar=None if grammar is None else text_or_file(grammar, ":"),
    )
    pair = load_pair(model, draft_model, fast=fast)
    like: Any = {"system": system_prompt, "template": not raw, "thinking": thinking}
    ids = [pair.encode(text, **like) for text in prompts]
    requests = [pair.prompts.request(tokens, params) for tokens in ids]
    rows = min(ROWS, len(requests))
    room = runner.positions(requests, rows)
    if prompt_cache_file is not None:
        room += cached_tokens(prompt_cache_file)
    session = pair.session(
        max_batch=rows,
        num_draft_tokens=drafts,
        positions=room,
        reuse=len(requests) > 1 or prompt_cache_file is not None,
    )
    if prompt_cache_file is not None:
        session.load_prompt_cache(prompt_cache_file)
    chunks = session.stream_requests(requests)
    if verbose:
        say(*report.describe(pair))
    say(f"Reading {_count(len(ids), 'prompt')}, {_count(sum(map(len, ids)), 'token')}")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    out = report.JsonPrinter(sys.stdout) if json else report.TextPrinter(len(ids), sys.stdout)
    results = report.show(chunks, out)
    more = [*report.details(results), *report.depth(session.depth)] if verbose else []
    say("", *more, *report.summary(results))
    if prompt_cache_file is not None:
        say(*report.taken_over(results, prompt_cache_file))
    failed = report.errors(results)
    say(*(f"{NAME}: error: {error}" for error in failed))
    return FAILED if failed else 0


@app.command()
def batch(
    prompts_file: Annotated[str, opt("FILE", "Requests, one JSON object a line; - is stdin.")],
    output: Annotated[Path, opt("FILE", "Results, one a line; resumed if it is there.")],
    model: Model = None,
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = "auto",
    fast: Fast = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests that run at a time, at most.")
    ] = ROWS,
    kv_budget: Annotated[float | None, opt("GB", "Memory for keys and values, at most.")] = None,
    max_tokens: Annotated[int, opt("N", "Where a line has none.", "--max-tokens", "-m")] = 256,
) -> int:
    """Generate from many requests in a file into another; the same command resumes.

    A request is {"prompt": TEXT}, {"messages": [...]} or {"tokens": [...]}, with its own settings
    (temperature, seed, stop, json_schema, ...), "n" for several answers and "id" to be given back.
    """
    drafts = read_depth(num_draft_tokens)
    if kv_budget is not None and not 0 < kv_budget < math.inf:
        raise ValueError(f"--kv-budget is {kv_budget}; it must be a number of GB above 0")
    from gemma_mtp_mlx import batch as runner
    from gemma_mtp_mlx import report
    from gemma_mtp_mlx.lines import read_lines
    from gemma_mtp_mlx.weights import fingerprint

    name = "standard input" if prompts_file == "-" else prompts_file
    with Path("/dev/stdin" if prompts_file == "-" else prompts_file).open("rb") as source:
        lines = read_lines(source, name, max_tokens)
    found = runner.read_output(output, lines, name)
    pair = load_pair(model, draft_model, fast=fast)
    jobs = runner.prepare(lines, found, pair.prompts, name)
    total = sum(line.choices for line in lines)
    del lines
    session = None
    if jobs:
        rows = min(batch_size, len(jobs))
        session = pair.session(
            max_batch=rows,
            num_draft_tokens=drafts,
            kv_bytes=None if kv_budget is None else int(kv_budget * 1e9),
            positions=runner.positions(jobs, rows),
        )
        runner.check_fit(session, jobs, name)
    out = runner.Output(output, found, fingerprint(pair.target, pair.target.config))
    if found.torn:
        say(f"Cut an unfinished line of {_count(found.torn, 'byte')} off the end of {output}")
    if found.done:
        say(f"{len(found.done)} of {total} requests are in {output} already")
    failed = {index for index, _ in found.failed}
    progress = report.Progress(total, len(found.done), sys.stderr)
    try:
        for pieces in () if session is None else runner.run(session, jobs, 2 * batch_size):
            for job, chunk in pieces:
                progress.add(chunk)
                if chunk.result is not None:
                    out.write(job, report.as_json(chunk.result))
                    if chunk.result.error is not None:
                        failed.add(job.index)
            assert session is not None
            progress.show([row.request.stats for row in session.engine.running])
    except KeyboardInterrupt:
        progress.close()
        there = f"{progress.done} of {total} requests are in {output}"
        say(f"{there}; the same command goes on from there")
        raise
    finally:
        progress.close()
        out.close()
    if session is not None:
        say(*progress.summary(session.depth))
    if failed:
        say(f"{NAME}: error: {report.failures(failed, name, output)}")
    return FAILED if failed else 0


@app.command()
def cache_prompt(
    prompt_cache_file: Annotated[Path, opt("FILE", "The file to write.")],
    model: Model = None,
    prompt: Annotated[str | None, opt("TEXT", "The prompt.", "--prompt", "-p")] = None,
    prompt_file: PromptFile = None,
    system_prompt: System = None,
    raw: NoTemplate = False,
    thinking: Think = None,
) -> None:
    """Compute a prompt once and keep it in a file, for generate and prompts that begin with it."""
    texts = read_prompts([] if prompt is None else [prompt], prompt_file)
    if len(texts) > 1:
        raise ValueError("give --prompt or --prompt-file, not both: a prompt cache has one prompt")
    if not prompt_cache_file.parent.is_dir():
        raise ValueError(f"there is no folder {prompt_cache_file.parent}; make it first")
    from gemma_mtp_mlx.cache import seat_size

    pair = load_pair(model, "none")
    like: Any = {"system": system_prompt, "template": not raw, "thinking": thinking}
    # What a longer prompt has in common with this one: not the end of the user's turn.
    whole, longer = (pair.encode(text, **like) for text in (texts[0], texts[0] + "\n\nx"))
    pairs = enumerate(zip(whole, longer, strict=False))
    common = next((place for place, (a, b) in pairs if a != b), len(whole))
    session = pair.session(max_batch=1, positions=seat_size(common + 1))
    kept = session.save_prompt_cache(whole[:common], prompt_cache_file)
    size = prompt_cache_file.stat().st_size / 1e6
    say(
        f"{prompt_cache_file}: {kept} of {_count(len(whole), 'token')}, {size:.1f} MB; only whole "
        f"chunks of {session.engine.chunk} are kept"
    )


app.command()(chat)
app.command()(convert)
app.command()(cli_models.pull)
app.command("list")(cli_models.list_)
app.command()(cli_models.rm)
app.command()(inspect)
app.command()(verify)
app.command()(doctor)
app.command()(predict)
app.command("report")(report_)
app.command()(serve)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fail(message: str) -> int:
    say(f"{NAME}: error: {' '.join(message.split())}")
    return BAD_INPUT
