"""Structured logs on standard error: JSON lines with request_id and trace_id wherever they are known."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import structlog

_INHERITED = "_TOKENMESH_LOG"
"""Environment variable that hands a service's log settings to the processes it starts."""


def setup_logging(level: str, style: str, **bound: Any) -> None:
    """Configures structlog and the standard library's logging for this process.

    `style` is "json" or "console". `bound` (role, replica) goes into every line. vLLM's own lines come through the same
    formatter, and child processes inherit all of it through `setup_inherited_logging`.
    """
    os.environ[_INHERITED] = json.dumps({"level": level, "style": style, "bound": bound})
    # Otherwise vLLM formats its own lines, and marks every line of its children in a way that breaks JSON.
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        lambda _logger, _name, event: {**bound, **event},
    ]
    renderer: Any = structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("vllm", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # vLLM narrates its start at INFO; its warnings are what an operator needs.
    logging.getLogger("vllm").setLevel("DEBUG" if level == "debug" else "WARNING")
    logging.getLogger("uvicorn.access").setLevel("WARNING")
    logging.getLogger("httpx").setLevel("WARNING")


def setup_inherited_logging(**bound: Any) -> None:
    """Sets up logging in a child process as its service did, with more bound values; by itself: JSON at level info."""
    inherited = json.loads(os.environ.get(_INHERITED, '{"level": "info", "style": "json", "bound": {}}'))
    setup_logging(inherited["level"], inherited["style"], **{**inherited["bound"], **bound})
