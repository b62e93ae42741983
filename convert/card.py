"""The model card of a converted folder: README.md, as the hub shows it."""

from collections.abc import Sequence

from gemma_mtp_mlx.convert.plan import ModelPlan


def model_card(plans: Sequence[ModelPlan], repository: str | None) -> str:
    """Return the card. plans: the target's, the drafter's; repository: where it will be, if known.

    A folder that is not uploaded is called by the placeholder FOLDER.
    """
    name = repository or "FOLDER"
    prompt = '--prompt "Write a quick sort in Python"'
    sources = [plan.origin[0] for plan in plans]
    drafter = f" and its drafter {sources[1]}" if len(sources) > 1 else ""
    return f"""{_front_matter(sources)}
# {repository or sources[0]} for MLX

{sources[0]}{drafter}, converted by mlx-gemma-mtp, which draws the same tokens with a drafter as
without one.

    pip install mlx-gemma-mtp
    mlx-gemma-mtp generate --model {name}{"" if drafter else " --draft-model none"} {prompt}

In mlx-lm the target runs by itself:

    mlx_lm.generate --model {name} {prompt}

| | weights | modules |
| --- | --- | ---: |
{"".join(_rows(plan) for plan in plans)}
conversion.json has the recipe, the error of every packed module against its source, and the SHA-256
of every file, sources included{"; drafter/conversion.json the drafter's" if drafter else ""}.
"""


def _front_matter(sources: Sequence[str]) -> str:
    """What the hub reads. A source on disk is nobody else's business, and has no licence there."""
    published = [source for source in sources if "/" in source]
    lines = ["library_name: mlx", "pipeline_tag: text-generation"]
    if published and all(source.startswith("google/") for source in published):
        lines.append("license: apache-2.0")
    if published:
        lines += ["base_model:", *(f"- {source}" for source in published)]
    lines += ["tags:", *(f"- {tag}" for tag in ("mlx", "gemma4", "mtp", "speculative-decoding"))]
    return "\n".join(["---", *lines, "---", ""])


def _rows(plan: ModelPlan) -> str:
    what = "drafter" if plan.folder else "target"
    formats = [
        f"{params['mode']}, {params['bits']} bits, groups of {params['group_size']}"
        for params in plan.params.values()
    ]
    counts = {said: formats.count(said) for said in formats}
    unpacked = len(plan.paths) - len(formats)
    if unpacked:
        counts[plan.config["dtype"]] = unpacked
    return "".join(f"| {what} | {said} | {count} |\n" for said, count in counts.items())
