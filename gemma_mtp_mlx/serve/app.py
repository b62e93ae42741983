"""The application: what is served where, and what stands in front of it."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_mtp_mlx import __version__
from gemma_mtp_mlx.serve import errors, openai, operations
from gemma_mtp_mlx.serve.guard import Guard
from gemma_mtp_mlx.serve.log import Log, entry_of
from gemma_mtp_mlx.serve.respond import Gone
from gemma_mtp_mlx.serve.runner import Runner

CLIENT_GONE = 499  # nobody reads it but the log


def make_app(runner: Runner) -> FastAPI:
    """Return the application that serves the model of a runner that has been started."""
    app = FastAPI(title="mlx-gemma-mtp", version=__version__, docs_url=None, redoc_url=None)
    app.state.runner = runner
    app.state.settings = runner.settings
    app.include_router(operations.router)
    app.include_router(openai.router)
    for kind in (RequestValidationError, HTTPException, ValueError):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(Gone, _gone)
    app.add_middleware(Guard, settings=runner.settings)
    if runner.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(runner.settings.allow_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(Log, count=runner.metrics.request)
    return app


def _refused(request: Request, error: Exception) -> JSONResponse:
    refusal = errors.as_refusal(error)
    entry_of(request.scope).error = refusal.detail[:500]
    return errors.response(request.url.path, refusal)


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
