"""A run's warnings for the first screen; many rows that were timed beside the same neighbour are one of them."""

from __future__ import annotations

from mmcompress.report.alerts import Alert
from mmcompress.report.format import row_name
from mmcompress.report.schema import Report

BUSY = "Other programs used"
"""How the warning of a row that was timed beside other programs begins."""


def warned(report: Report) -> list[Alert]:
    """The warnings in their order; those about single rows that were disturbed are said once, where there are several."""
    rows = [row for row in report.rows if row.disturbed]
    several = len(rows) > 1
    found = [
        Alert("caution", f"{w.step}: {w.text}" if w.step else w.text)
        for w in report.warnings
        if not (several and w.text.startswith(BUSY))
    ]
    if not several or not any(w.text.startswith(BUSY) for w in report.warnings):
        return found
    most = max(row.busy_cores or 0.0 for row in rows)
    names = ", ".join(row_name(row) for row in rows)
    every = "all" if len(rows) == len(report.rows) else f"{len(rows)} of {len(report.rows)}"
    places = ", ".join(dict.fromkeys(f"measurements/{row.folder.rsplit('/', 1)[-1]}" for row in rows if row.folder))
    again = f" Delete {places} in the run's folder and run again to measure anew." if places else ""
    what = (
        f"{BUSY} up to {most:.1f} cores while {every} models were timed one by one ({names}): those times are not to be trusted."
    )
    return [Alert("caution", what + again), *found]
