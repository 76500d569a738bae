"""One logging set-up: to stderr, one line an event, `time level process message`. Data goes to stdout, never here."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str = "info") -> None:
    """Send all records to stderr. `process` names this process in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d %(levelname)-7s {process} %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
