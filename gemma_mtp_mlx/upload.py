"""Put a converted folder on the Hugging Face hub."""

import re
import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def check_upload(repository: str) -> None:
    """Raise ValueError unless the name is a repository's and somebody is logged in."""
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"--upload-repo is {repository!r}; give it as owner/name")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            f"nobody is logged in who could upload {repository}; run: hf auth login"
        ) from error
    except HTTPError as error:
        raise ValueError(
            f"{repository} could not be uploaded ({_said(error)}); check the network, or run: "
            "hf auth login"
        ) from error


def upload(folder: Path, repository: str) -> str:
    """Upload a folder, making the repository if there is none, and return its address.

    Raises: ValueError with the reason, and the command that goes on.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Convert for MLX with mlx-gemma-mtp",
        )
    except (HTTPError, OSError) as error:
        again = f"hf upload {repository} {shlex.quote(str(folder))}"
        raise ValueError(
            f"{folder} is complete, but was not uploaded ({_said(error)}); then run: {again}"
        ) from error
    return f"{api.endpoint}/{repository}"


def _said(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    return str(error).partition("\n")[0] or type(error).__name__
