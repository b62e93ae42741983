"""What can go wrong between a user and the Hugging Face hub, in one line with a remedy each."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_TOKEN = "Invalid credentials in Authorization header"


def refused(error: Exception) -> bool:
    """Return whether the hub has answered, and would answer the same again."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def no_room(repository: str, what: str) -> ValueError:
    """Return the error of a full disk. what: how full."""
    return ValueError(
        f"no room for {repository}: it {what} in {constants.HF_HUB_CACHE}; free some there, or set "
        "HF_HOME to a folder on a larger disk; what has arrived is kept"
    )


@contextmanager
def explained(repository: str, revision: str, *, cached: bool) -> Iterator[None]:
    """Turn what can go wrong with the hub into a ValueError of one line with a remedy.

    cached: whether what is looked for is in the cache, where it is found without the hub.
    """
    try:
        yield
    except HfHubHTTPError as error:
        there = "; HF_HUB_OFFLINE=1 loads the copy in the cache" if cached else ""
        raise ValueError(_refusal(error, repository, revision) + there) from error
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"{repository} is not in {constants.HF_HUB_CACHE}, or not all of it, and "
            "HF_HUB_OFFLINE is set; unset it to use the network, or give a folder on disk"
        ) from error
    except HTTPError as error:
        raise ValueError(
            f"there is no folder {repository}, and the hub cannot be reached to download it "
            f"({_first_line(error)}); connect to the network and run the same again, or give a "
            "folder on disk; what has arrived is kept"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"what answers at {constants.ENDPOINT} for {repository} is not the hub; check the "
            "network (is there a login page?) and HF_ENDPOINT, then try again"
        ) from error
    except OSError as error:
        raise ValueError(
            f"downloading {repository} failed: {_first_line(error)}; try again"
        ) from error


def _refusal(error: HfHubHTTPError, repository: str, revision: str) -> str:
    """Return what an answer of the hub means, and the remedy."""
    status, said = error.response.status_code, error.response.headers.get("X-Error-Message")
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} asks you to accept its licence: do so at {page}, then run: hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repository} has no revision {revision}; give a branch, tag or commit that "
            f"{page}/commits lists"
        )
    if status == 401 and said == _BAD_TOKEN:
        return (
            f"{repository}: the hub does not know your token; run: hf auth login, or unset HF_TOKEN"
        )
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder {repository} and no such repository on the hub; check the "
            "spelling, or run: hf auth login (if it is private)"
        )
    if status == 403:
        return (
            f"{repository}: your token may not read it; make one that may, and run: hf auth login"
        )
    if status == 429:
        return f"{repository}: the hub asks for fewer requests; wait some minutes, then try again"
    return f"{repository}: the hub fails (status {status}); try again later"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
