"""The one place where onnxruntime is imported, with its telemetry switched off."""

from __future__ import annotations

import os
from typing import Any

SWITCH = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """The module onnxruntime.

    When it is imported, onnxruntime 1.31 writes a device id and a database of events into the user's cache folder, and
    later looks up its vendor's host. Only this environment variable prevents it, and only if it is set before the
    import: the library's own function `disable_telemetry_events` comes too late. A value that the user has set stays.

    Raises:
        ImportError: the package is not installed.
    """
    os.environ.setdefault(SWITCH, "1")
    import onnxruntime

    return onnxruntime
