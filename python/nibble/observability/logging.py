"""One line a record, with the process it comes from."""

import logging
import sys


def configure_logging(level: str, process: str) -> None:
    """Logs of this process go to standard error, marked with `process` ("server", "rank 0", …)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
