"""What whoever runs the server asks: is it well, how busy is it."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gemma_mtp_mlx.serve.metrics import CONTENT_TYPE
from gemma_mtp_mlx.serve.runner import Runner

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Say whether answers can be had, and how many run and wait."""
    runner: Runner = request.app.state.runner
    held = runner.occupancy()
    said: dict[str, Any] = {
        "status": "failed" if runner.session.failed else "ok",
        "model": runner.served.name,
        "drafter": runner.served.drafter,
        "running": held.running,
        "waiting": runner.waiting,
        "kv_bytes": held.bytes,
        "kv_bytes_used": held.bytes_used,
    }
    return JSONResponse(said, 503 if runner.session.failed else 200)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return counters as Prometheus reads them."""
    runner: Runner = request.app.state.runner
    return Response(runner.metrics.page(), media_type=CONTENT_TYPE)
