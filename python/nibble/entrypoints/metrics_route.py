"""`GET /metrics`."""

from fastapi import APIRouter, Response

from nibble.entrypoints.streaming import answers_with
from nibble.observability.metrics import CONTENT_TYPE, EngineMetrics


def metrics_router(metrics: EngineMetrics) -> APIRouter:
    """The route, which exists only where metrics are kept."""
    router = APIRouter(tags=["server"])

    @router.get("/metrics", response_class=Response, responses=answers_with("text/plain"))
    async def get_metrics() -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
