"""The command that predicts what a model does on a chip: predict."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gemma_mtp_mlx.options import MEMORY, flag, opt

if TYPE_CHECKING:
    from gemma_mtp_mlx.chips import Chip
    from gemma_mtp_mlx.outline import Outline

MOST_ROWS, MOST_CONTEXT = 64, 1 << 20
ALL = "all"


def predict(
    model: Annotated[
        str, opt("FAMILY|DIR_OR_REPO", "E2B, E4B, 12B, 26B-A4B or 31B; or a model of your own.")
    ] = "26B-A4B",
    draft_model: Annotated[
        str, opt("auto|none|DIR_OR_REPO", "The drafter; auto: the model's own.")
    ] = "auto",
    chip: Annotated[
        str | None, opt("NAME|all", "Such as M4 Max; this Mac's if not given, or all.")
    ] = None,
    bits: Annotated[
        str | None, opt("4|5|6|8|16|MODE", "Of a family's target; 4 if not, 16 is bfloat16.")
    ] = None,
    draft_bits: Annotated[str | None, opt("4|5|6|8|16|MODE", "Of its drafter; 4 if not.")] = None,
    batch: Annotated[
        str, opt('"N N ..."', "Rows at a time, one number or several: 1,4,8 or '1 4 8'.")
    ] = "1,4,8",
    context: Annotated[int, opt("N", "Tokens in each row's context.")] = 1024,
    acceptance: Annotated[
        float | None, opt("A", "Chance of each draft to be kept, 0 to 1, instead of --prompts.")
    ] = None,
    prompts: Annotated[
        str | None, opt("KIND", "code, chat, prose, json or repeat; chat if not given.")
    ] = None,
    memory: Annotated[
        float | None, opt("GB", f"{MEMORY} If not given: this Mac's, or of the largest sold.")
    ] = None,
    json: Annotated[bool, flag("Print one JSON object.", "--json")] = False,
    plot: Annotated[
        Path | None, opt("FILE.png", "Draw the speed-up against acceptance; needs matplotlib.")
    ] = None,
) -> None:
    """Predict tokens per second with and without drafts, the best depth and whether it fits.

    By a cost model, from published figures of Apple's chips. Nothing is measured, on any machine.
    """
    from json import dumps

    from gemma_mtp_mlx import predict_report

    rows = _rows(batch)
    if not 0 < context <= MOST_CONTEXT:
        raise ValueError(f"--context is {context}; it must be 1 to {MOST_CONTEXT}")
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory is {memory}; it must be a number of GB above 0")
    asked = predict_report.Asked(
        outline=_outline(model, draft_model, bits, draft_bits),
        chips=_chips(chip),
        rows=rows,
        context=context,
        kind=_kind(acceptance, prompts),
        chances=_chances(acceptance, prompts),
        memory_bytes=_memory(memory, chip),
        memory_of="on this Mac" if memory is None else "(--memory)",
    )
    if plot is not None:
        from gemma_mtp_mlx import predict_plot

        predict_plot.write(asked, plot)
    if json:
        print(dumps(predict_report.as_json(asked)))
    else:
        print("\n".join(predict_report.lines(asked)))


def _rows(batch: str) -> tuple[int, ...]:
    words = batch.replace(",", " ").split()
    if not words or not all(w.isdecimal() and 0 < int(w) <= MOST_ROWS for w in words):
        raise ValueError(
            f"--batch is {batch!r}; it must be numbers of 1 to {MOST_ROWS}, such as 1,4,8"
        )
    return tuple(dict.fromkeys(map(int, words)))


def _memory(given: float | None, chip: str | None) -> int | None:
    """Return bytes that MLX may use: as given, or this Mac's if its chip is asked for."""
    if given is not None or chip is not None:
        return None if given is None else int(given * 1e9)
    from gemma_mtp_mlx.memory import device_bytes

    return device_bytes()


def _chips(name: str | None) -> "tuple[Chip, ...]":
    from gemma_mtp_mlx import chips, machine

    if name is not None and name.lower() == ALL:
        return tuple(chips.CHIPS.values())
    if name is not None:
        return (chips.find(name),)
    own = chips.this_chip(machine.facts().gpu_cores)
    if own is None:
        raise ValueError(
            f"this is not a Mac; say which chip with --chip: {', '.join(chips.CHIPS)}, or {ALL}"
        )
    return (own,)


def _kind(acceptance: float | None, prompts: str | None) -> str | None:
    if acceptance is not None and prompts is not None:
        raise ValueError("--acceptance and --prompts say the same in two ways; give one of them")
    return None if acceptance is not None else prompts or "chat"


def _chances(acceptance: float | None, prompts: str | None) -> tuple[float, ...]:
    if acceptance is not None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"--acceptance is {acceptance}; it must be 0 to 1")
        return (acceptance,)
    from gemma_mtp_mlx.acceptances import KINDS

    kind = prompts or "chat"
    if kind not in KINDS:
        raise ValueError(f"--prompts is {kind}; it must be one of {', '.join(KINDS)}")
    return KINDS[kind].chances


def _outline(model: str, drafter: str, bits: str | None, draft_bits: str | None) -> "Outline":
    from gemma_mtp_mlx import inspection, outline

    family = outline.family_of(model)
    if family is None:
        if bits is not None or draft_bits is not None:
            raise ValueError(
                f"--bits is for families ({', '.join(outline.TEXTS)}); {model} has its own formats"
            )
        return outline.of_inspection(inspection.inspect(model, drafter))
    if drafter != "auto":
        raise ValueError(f"--draft-model is for models of your own; {family} has its published one")
    for option, given in (("--bits", bits), ("--draft-bits", draft_bits)):
        if given is not None and given not in outline.FORMATS:
            raise ValueError(f"{option} is {given}; it must be one of {', '.join(outline.FORMATS)}")
    return outline.of_family(family, bits or "4", draft_bits or "4")
