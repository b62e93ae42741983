"""The command line: `mlx-gemma-mtp generate` and `mlx-gemma-mtp convert`.

Text goes to stdout as it is generated, everything else to stderr. What a user can get wrong ends in
one line and exit code 2. Importing mlx_lm takes seconds, so a command imports what it needs when
its options have been read.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_mtp_mlx import __version__

if TYPE_CHECKING:
    from gemma_mtp_mlx.api import Chunk, Pair, Result
    from gemma_mtp_mlx.report import Printer

NAME = "mlx-gemma-mtp"
BAD_INPUT, INTERRUPTED = 2, 130

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Gemma 4 with its MTP drafter on MLX: the same tokens, in fewer passes.",
)


class Dtype(StrEnum):
    """What `--dtype` may be."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A closed stdout ends it quietly with 1."""
    try:
        return app(args=argv, prog_name=NAME, standalone_mode=False) or 0
    except typer.TyperException as error:
        return _fail(f"{error.format_message().rstrip('.')}; see {NAME} --help")
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"{where}{error.strerror or error}")
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


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
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_REPO", help="The target; the built-in pair if not given."),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO|none",
            help="The drafter; the one in the target's folder if not given.",
        ),
    ] = None,
    num_draft_tokens: Annotated[
        int, typer.Option(min=0, max=15, metavar="N", help="Tokens drafted per round.")
    ] = 4,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt; several are one batch."),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with a prompt; - is stdin.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", metavar="N", help="Most tokens per prompt.")
    ] = 256,
    temp: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample from the best that make up P; 1 is off.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Sample from the N best tokens; 0 is off.")
    ] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Least probability relative to the best; 0 is off.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed for sampling; fresh if not given.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message, put first.")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Take the prompt as it is.")
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text that ends the output; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more on stderr.")] = False,
) -> None:
    """Generate text from one prompt or several."""
    prompts = _prompts(prompt or [], prompt_file)
    from gemma_mtp_mlx import SamplingParams, report

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    pair = _load(model, draft_model)
    template = not ignore_chat_template
    ids = [pair.encode(text, system=system_prompt, template=template) for text in prompts]
    chunks = pair.stream_batch(ids, params, num_draft_tokens=num_draft_tokens)
    if verbose:
        _say(*report.describe(pair))
    _say(f"Reading {_count(len(ids), 'prompt')}, {_count(sum(map(len, ids)), 'token')}")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    out = report.JsonPrinter(sys.stdout) if json else report.TextPrinter(len(ids), sys.stdout)
    results = _show(chunks, out)
    _say("", *(report.details(results) if verbose else ()), *report.summary(results))


@app.command()
def convert(
    hf_path: Annotated[
        str, typer.Option(metavar="DIR_OR_REPO", help="Checkpoint of the target to convert.")
    ],
    mlx_path: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; new or empty.")],
    draft_hf_path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_REPO", help="Checkpoint of its drafter, written to DIR/drafter."
        ),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantise the weights.")
    ] = False,
    q_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Bits per weight, with -q.  [default: 4]")
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights per scale, with -q.  [default: 64]")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of what is not quantised; as it is if not given.")
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint, and its drafter, to a folder for MLX."""
    if not quantize and (q_bits, q_group_size) != (None, None):
        raise ValueError("--q-bits and --q-group-size need -q, which asks for quantisation")
    from gemma_mtp_mlx import convert as converter
    from gemma_mtp_mlx import report

    quantization = None
    if quantize:
        given = {"bits": q_bits, "group_size": q_group_size}
        quantization = converter.Quantization(
            **{name: value for name, value in given.items() if value is not None}
        )
    written = converter.convert(
        hf_path,
        mlx_path,
        draft_source=draft_hf_path,
        quantization=quantization,
        dtype=None if dtype is None else dtype.value,
        on_tensor=_progress,
    )
    _say(*report.converted(written, mlx_path))


def _prompts(texts: list[str], file: str | None) -> list[str]:
    """Return the prompts given as text and the one in a file, which is taken as it is."""
    prompts = [text.encode("utf-8", "surrogateescape") for text in texts]
    names = ["--prompt"] * len(prompts)
    if file is not None:
        prompts.append(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
        names.append("standard input" if file == "-" else file)
    if not prompts:
        raise ValueError(
            "there is no prompt; give --prompt TEXT or --prompt-file FILE (- is stdin)"
        )
    return [_decode(data, name) for data, name in zip(prompts, names, strict=True)]


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} is not UTF-8; give the prompt as UTF-8 text"
        ) from error


def _load(model: str | None, draft_model: str | None) -> "Pair":
    from gemma_mtp_mlx import hub, load

    if model is None:
        _say(f"{NAME}: no --model given: using the small built-in pair, trained on Python code")
    began = time.perf_counter()
    drafter = None if draft_model == "none" else draft_model or "auto"
    pair = load(hub.builtin() if model is None else model, drafter)
    plain = " without a drafter" if pair.drafter is None else ""
    _say(f"Loaded{plain} in {time.perf_counter() - began:.1f} s")
    return pair


def _show(chunks: Iterable["Chunk"], printer: "Printer") -> list["Result"]:
    """Show chunks as they come and return the results, by prompt."""
    results = {}
    try:
        for chunk in chunks:
            printer.add(chunk)
            if chunk.result is not None:
                results[chunk.index] = chunk.result
    except KeyboardInterrupt:
        printer.close()
        _say("interrupted")
        raise
    return [results[index] for index in sorted(results)]


def _progress(name: str, done: int, total: int) -> None:
    """Show how far a model's conversion has come: on one line that changes, or when it is done."""
    if sys.stderr.isatty():
        print(f"\r\033[K{done} of {total}: {name}", end="", file=sys.stderr, flush=True)
        if done == total:
            print("\r\033[K", end="", file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    _say(f"{NAME}: error: {' '.join(message.split())}")
    return BAD_INPUT
