"""One line of JSON per event, on standard error. Secrets, subjects and bodies are never handed to the logger."""

from seqr.logs import JsonLines, configure

__all__ = ["JsonLines", "configure_logging"]


def configure_logging(level: str = "INFO") -> None:
    """See ``seqr.logs.configure``."""
    configure("json", level)
