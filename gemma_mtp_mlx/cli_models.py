"""The commands for models as such: `pull`, `list` and `rm`."""

import json
import sys
from typing import Annotated

import typer

from gemma_mtp_mlx.options import flag

Name = Annotated[str, typer.Argument(help="A hub repository, or a short name such as gemma4:26b.")]


def pull(
    name: Name,
    no_drafter: Annotated[bool, flag("Not the drafter that goes with it.", "--no-drafter")] = False,
) -> None:
    """Download a model and its drafter, or what is missing of them, and check every file."""
    from gemma_mtp_mlx import hub

    for path in hub.pull(name, drafter=not no_drafter):
        print(path, flush=True)


def list_(
    as_json: Annotated[bool, flag("Print one JSON object per model.", "--json")] = False,
) -> None:
    """List the Gemma 4 models that are downloaded."""
    from huggingface_hub import constants

    from gemma_mtp_mlx import hub_cache

    models = hub_cache.cached_models()
    if as_json:
        for model in models:
            print(json.dumps(hub_cache.as_json(model)))
    elif models:
        print(*hub_cache.table(models), sep="\n")
    if not models:
        _say(f"There is no Gemma 4 model in {constants.HF_HUB_CACHE}")


def rm(
    name: Name,
    yes: Annotated[bool, flag("Do not ask.", "--yes", "-y")] = False,
) -> None:
    """Remove a downloaded model, all of its revisions."""
    from gemma_mtp_mlx import catalogue, hub_cache
    from gemma_mtp_mlx.download import readable

    found = hub_cache.find(name)
    repository = found[0].repository
    size = readable(sum(model.size_bytes for model in found))
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError(f"removing {repository} ({size}) needs a yes; give --yes")
        if not typer.confirm(f"Remove {repository} ({size})?", err=True):
            _say("Nothing was removed")
            return
    freed = hub_cache.remove(repository)
    _say(f"Removed {repository}: {readable(freed)} freed")
    drafter = catalogue.drafter_repository(repository)
    if drafter in {model.repository for model in hub_cache.cached_models()}:
        _say(f"Its drafter is still there: {drafter}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
