"""Durations as text."""

import math


def duration(seconds: float) -> str:
    """Format seconds, e.g. "40 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
