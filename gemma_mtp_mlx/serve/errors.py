"""What is refused, and how each protocol says so."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# In a place that pydantic names, beside the types of what may be this or that.
_FIELD = re.compile(r"(?!(str|int|float|bool|dict)$)[a-z_]+|[0-9]+")


class Refusal(HTTPException):
    """A request that is not served. param: the field at fault; code: OpenAI's short word for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code


def response(path: str, error: Exception) -> JSONResponse:
    """Return an error as the protocol of a path spells it."""
    refusal = as_refusal(error)
    return JSONResponse(body(path, refusal), refusal.status_code, refusal.headers)


def body(path: str, refusal: Refusal) -> dict[str, Any]:
    """Return what a refusal's response says: Ollama's are a text, OpenAI's an object."""
    if path.startswith("/api/"):
        return {"error": refusal.detail}
    status = refusal.status_code
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {
        "error": {
            "message": refusal.detail,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def as_refusal(error: Exception) -> Refusal:
    """Return what an exception means to a client: bad input is a ValueError's."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, ValueError):
        return Refusal(400, " ".join(str(error).split()))
    return Refusal(500, "the server failed; its log says how", code="internal_error")


def _invalid(error: RequestValidationError) -> Refusal:
    """Name the field that is wrong, and what is.

    Of what may be this or that there is an error for each; the one that goes deepest is meant.
    """
    found = max(error.errors(), key=lambda each: len(each["loc"]))
    if found["type"] == "json_invalid":
        why = found.get("ctx", {}).get("error", "")
        return Refusal(400, f"the body is not JSON: {why} at character {found['loc'][-1]}")
    if found["type"] == "extra_forbidden":
        field = str(found["loc"][-1])[:80]
        return Refusal(400, f"the field {field!r} is not supported; leave it out", param=field)
    name = ".".join(part for part in map(str, found["loc"][1:]) if _FIELD.fullmatch(part))
    message = str(found["msg"]).removeprefix("Value error, ")
    return Refusal(400, f"{name}: {message}" if name else message, param=name or None)
