"""``seqr coordinator serve``: the REST API over TLS, and the loop behind it."""

import logging

import uvicorn

from coordinator.api import create_app
from coordinator.core import open_coordinator
from coordinator.errors import InsecureListen
from coordinator.flower_nodes import FlowerNodes
from coordinator.logs import configure_logging
from coordinator.settings import Settings
from seqr.settings import LOOPBACK
from seqr.supervisor import follow_supervisor

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until stopped. Raises InsecureListen, StateDirMissing, DatabaseUnusable, PolicyError before it listens."""
    require_tls(settings)
    coordinator = open_coordinator(settings)
    try:
        coordinator.require_policy()
        configure_logging()
        follow_supervisor()
        app = create_app(coordinator, FlowerNodes(settings))
        logger.info("coordinator %s listens on %s:%d", coordinator.key.public.key_id, settings.host, settings.port)
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=10,
        )
    finally:
        coordinator.close()


def require_tls(settings: Settings) -> None:
    """Raises InsecureListen where API keys would cross a network in the clear."""
    if settings.ssl_certfile is None and settings.host not in LOOPBACK and not settings.allow_plain_http:
        raise InsecureListen(
            f"listening on {settings.host} without TLS would send API keys in the clear; give --ssl-certfile and "
            "--ssl-keyfile (`seqr coordinator certs` makes a pair), or set allow_plain_http behind a TLS proxy"
        )
