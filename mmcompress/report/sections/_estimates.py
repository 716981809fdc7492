"""How the parts on behaviour and calibration write numbers with intervals."""

from __future__ import annotations

from mmcompress.report.format import MISSING
from mmcompress.report.schema_behaviour import Estimate
from mmcompress.report.tables import Cell

PERCENT = 100.0


def number(value: float, scale: float = 1.0, decimals: int = 3, sign: bool = False) -> str:
    """``"1.4"``; with ``sign`` ``"+1.4"``. A zero has no sign."""
    text = f"{value * scale:.{decimals}f}"
    if float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if sign and not text.startswith("-") else text


def interval(found: Estimate, scale: float = 1.0, decimals: int = 3, sign: bool = False) -> str:
    """``"1.2 to 1.6"``, or nothing where there is none."""
    if found.low is None or found.high is None:
        return ""
    return f"{number(found.low, scale, decimals, sign)} to {number(found.high, scale, decimals, sign)}"


def cell(found: Estimate | None, scale: float = 1.0, decimals: int = 3, sign: bool = False, tone: str = "") -> Cell:
    """The number with its interval below."""
    if found is None:
        return Cell(MISSING)
    return Cell(number(found.value, scale, decimals, sign), (interval(found, scale, decimals, sign),), tone)


def share(found: Estimate) -> str:
    """``"1.4% (95% interval 0.8 to 2.3)"``."""
    ends = interval(found, PERCENT, 1)
    return f"{number(found.value, PERCENT, 1)}%" + (f" (95% interval {ends})" if ends else "")
