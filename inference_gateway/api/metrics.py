"""GET /metrics, for keys of scope metrics: it tells of all silos, so it is the operator's."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from inference_gateway.api.auth import Operator, ServiceDep

router = APIRouter()


@router.get("/metrics")
async def metrics(service: ServiceDep, _operator: Operator) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
