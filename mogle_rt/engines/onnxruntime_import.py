"""The only place where onnxruntime is imported. Its telemetry is switched off here."""

from __future__ import annotations

import os
from typing import Any

SWITCH = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """Import onnxruntime without telemetry, and return the module.

    When it is imported, onnxruntime 1.31 writes a device id and a database of events into the user's cache folder, and
    later looks up its vendor's host. Only the environment variable `SWITCH` prevents this, and only if it is set before
    the import. The library's own function `disable_telemetry_events` comes too late. A value that the user set is kept.

    Raises:
        ImportError: the package is not installed.
    """
    os.environ.setdefault(SWITCH, "1")
    import onnxruntime

    return onnxruntime
