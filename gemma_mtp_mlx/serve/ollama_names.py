"""What Ollama's users call models: a name, a colon and a tag, which is "latest" if not said."""

from gemma_mtp_mlx import catalogue, hub
from gemma_mtp_mlx.serve.errors import Refusal
from gemma_mtp_mlx.serve.served import Served

LATEST = ":latest"
DEFAULT = f"{catalogue.SHORT}e4b"  # what Ollama's library gives who says gemma4 alone


def full_name(name: str) -> str:
    """Return a name with its tag, as lists of models show it."""
    return name if ":" in name else name + LATEST


def is_served(served: Served, name: str) -> bool:
    """Return whether a name means the model that is served."""
    plain = _plain(name)
    return plain == served.name or plain.lower() in served.aliases


def check_name(served: Served, name: str) -> None:
    """Raise Refusal if a name does not mean the model that is served, saying what there is."""
    if is_served(served, name):
        return
    here = f"this server serves {full_name(served.name)}"
    try:
        hub_name(name)
    except Refusal as refusal:
        raise Refusal(404, f"{refusal.detail}; {here}") from refusal
    raise _not_found(name, f"{here}; serve it with: mlx-gemma-mtp serve --model {_plain(name)}")


def hub_name(name: str) -> str:
    """Return what a name stands for, as owner/name@revision, which is no folder of this machine.

    Raises: Refusal for what is no name on the hub.
    """
    plain = _plain(name)
    try:
        if ".." in plain:
            raise ValueError("it is no name of a repository")
        if "/" not in plain and not plain.lower().startswith(catalogue.SHORT):
            return catalogue.repository(plain)  # raises, listing the names there are
        return "@".join(hub.split_name(plain))
    except ValueError as error:
        raise _not_found(name, str(error)) from error


def _plain(name: str) -> str:
    """Return a name as this program knows it."""
    plain = name.removesuffix(LATEST)
    return DEFAULT if f"{plain.lower()}:" == catalogue.SHORT else plain


def _not_found(name: str, why: str) -> Refusal:
    return Refusal(404, f"model {name[:200]!r} not found: {why[:1000]}", code="model_not_found")
