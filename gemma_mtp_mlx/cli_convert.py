"""The convert command: its options, its progress and what it says of what it wrote."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gemma_mtp_mlx.options import Dtype, QMode, flag, opt
from gemma_mtp_mlx.progress import Progress, say

if TYPE_CHECKING:
    from gemma_mtp_mlx.convert import Report
    from gemma_mtp_mlx.convert.record import Written

MOST_NAMED = 5


def convert(
    hf_path: Annotated[
        str, opt("DIR_OR_REPO", "Checkpoint of the target: a folder, a GGUF file, a repository.")
    ],
    mlx_path: Annotated[Path, opt("DIR", "Folder to write; new or empty.")],
    draft_hf_path: Annotated[
        str,
        opt("DIR_OR_REPO|auto|none", "Checkpoint of its drafter; auto: the target's own."),
    ] = "auto",
    quantize: Annotated[bool, flag("Quantise the weights.", "--quantize", "-q")] = False,
    q_mode: Annotated[
        QMode | None,
        flag("How, with -q; qat keeps the q4_0 grid of a QAT checkpoint.  [default: affine]"),
    ] = None,
    q_bits: Annotated[int | None, opt("N", "Bits per weight, with -q.  [default: 4]")] = None,
    q_group_size: Annotated[
        int | None, opt("N", "Weights per scale, with -q.  [default: 64]")
    ] = None,
    q_recipe: Annotated[
        Path | None, opt("FILE", "Rules by module, before those of -q: JSON, see the README.")
    ] = None,
    dtype: Annotated[Dtype | None, flag("Type of what is not quantised; as it is if not.")] = None,
    upload_repo: Annotated[
        str | None, opt("REPO", "Where to upload the folder when it is complete.")
    ] = None,
) -> None:
    """Convert a checkpoint, and its drafter, to a folder for MLX; the same command resumes."""
    if not quantize and (q_mode, q_bits, q_group_size) != (None, None, None):
        raise ValueError("--q-mode, --q-bits and --q-group-size need -q, which asks to quantise")
    from gemma_mtp_mlx import convert as converter
    from gemma_mtp_mlx import hub
    from gemma_mtp_mlx.upload import check_upload, upload

    quantization = None
    if quantize:
        mode = "affine" if q_mode is None else q_mode.value
        quantization = converter.Quantization(mode, q_bits, q_group_size)
    rules = [] if q_recipe is None else converter.read_rules(q_recipe)
    converter.check_out(mlx_path)
    if upload_repo is not None:
        check_upload(upload_repo)
    source = hub.resolve_source(hf_path)
    drafter = None if draft_hf_path == "none" else draft_hf_path
    if drafter == "auto":
        drafter = hub.drafter_name(source)
    plans = converter.prepare(
        str(source),  # the hub is asked once
        draft_source=drafter,
        quantization=quantization,
        rules=rules,
        dtype=None if dtype is None else dtype.value,
    )
    say(*converter.doubts_of(plans))
    if drafter is None and draft_hf_path != "none":
        say("No drafter is known for this target, none is converted; --draft-hf-path names one")
    progress = Progress(sys.stderr)
    try:
        report = converter.write(plans, mlx_path, repository=upload_repo, on_bytes=progress.show)
    except (KeyboardInterrupt, OSError):
        progress.close()
        partial = converter.partial_folder(mlx_path)
        if partial.exists():
            say(f"Finished files are kept in {partial}; the same command goes on from there")
        raise
    finally:
        progress.close()
    say(*lines(report, mlx_path))
    if upload_repo is not None:
        print(upload(mlx_path, upload_repo))


def lines(report: "Report", folder: Path) -> Iterator[str]:
    """Yield what a conversion wrote and how to use it."""
    yield from _written(report.target, folder)
    model = shlex.quote(str(folder))
    if report.drafter is None:
        model += " --draft-model none"
    else:
        yield from _written(report.drafter, folder / "drafter")
    yield f"Try: mlx-gemma-mtp generate --model {model} --prompt Hello"


def _written(part: "Written", folder: Path) -> Iterator[str]:
    text = f"{part.used} tensors, {part.bytes_in / 1e6:.1f} MB as {part.bytes_out / 1e6:.1f} MB"
    if part.packed:
        text += f", {_modules(part.packed)} quantised"
    if part.taken:
        text += f", {_modules(part.taken)} quantised as in the source"
    if part.kept:
        text += f", {len(part.kept)} not ({_some(part.kept)})"
    for reason, count in part.skipped.items():
        text += f", {count} skipped ({reason})"
    yield f"{folder}: {text}"
    if part.equal is not None:
        yield (
            f"  On the q4_0 grid: {part.equal:.4%} of the weights of {_modules(len(part.on_grid))} "
            "are exactly the source's"
        )
    if part.off_grid:
        yield f"  Not on it: {_modules(len(part.off_grid))} ({_some(part.off_grid)})"
    worst = list(part.errors.items())[:MOST_NAMED]
    if worst:
        yield "  Errors, relative (rms), rms and greatest, worst first; all in conversion.json:"
        for path, error in worst:
            yield f"    {error.relative:.2%}  {error.rms:.2e}  {error.largest:.2e}  {path}"


def _modules(count: int) -> str:
    return f"{count} module{'s' * (count != 1)}"


def _some(paths: tuple[str, ...]) -> str:
    named = ", ".join(paths[:MOST_NAMED])
    return f"{named}, ..." if len(paths) > MOST_NAMED else named
