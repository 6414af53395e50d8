"""Logs as JSON, one object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from kvbits.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


class JsonLines(logging.Formatter):
    """Time, level, logger, message, and the ``facts`` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def check_level(level: str) -> None:
    """Raise ``ConfigError`` for an unknown level."""
    if level not in LEVELS:
        raise ConfigError(f"log level '{level}' is unknown; choose from {', '.join(LEVELS)}")


def set_up(level: str) -> None:
    """Send the logs of kvbits and uvicorn to stderr. Raises ``ConfigError`` for an unknown level."""
    check_level(level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("kvbits", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
