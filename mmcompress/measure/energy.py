"""Energy of the processor's packages, as Linux tells it (RAPL): joules where the machine can tell them, else why not.

The counters are of whole packages: what they need when idle is in them, and so is what other programs make them do.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

POWERCAP = Path("/sys/class/powercap")
OFTEN = 60.0
"""Seconds between looks while a long piece of work runs: a counter comes round once in many minutes under full load."""


class Counters:
    """The energy counters of all packages.

    Attributes:
        reason: why they cannot be read; empty where they can.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Looks for the counters.

        Args:
            root: where Linux has its power zones. ``intel-rapl:<n>`` are packages (AMD's are called so too) or the whole
                platform; ``intel-rapl:<n>:<m>`` are parts of a package, which would count twice.
        """
        self.zones: list[Path] = []
        self.reason = ""
        zones = sorted(root.glob("intel-rapl:*"))
        for zone in zones:
            if zone.name.count(":") > 1 or not _text(zone / "name").startswith("package"):
                continue
            try:
                int((zone / "energy_uj").read_text())
                int((zone / "max_energy_range_uj").read_text())
            except PermissionError:
                self.reason = f"{zone / 'energy_uj'} may not be read by this user; the administrator can allow it"
                break
            except (OSError, ValueError) as e:
                self.reason = f"{zone / 'energy_uj'} cannot be read: {e}"
                break
            self.zones.append(zone)
        if self.reason:
            self.zones = []
        elif not self.zones:
            self.reason = f"this machine shows no energy counter of a processor package in {root} (most virtual machines do not)"

    def read(self) -> list[int] | None:
        """All counters in microjoules; None where they cannot be read."""
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self.zones] or None
        except (OSError, ValueError) as e:
            self.zones, self.reason = [], f"the energy counters could no longer be read: {e}"
            return None

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """What was used between two looks. A counter that is lower than before has come round, once.

        The counter runs from 0 to ``max_energy_range_uj`` (Documentation/power/powercap in the Linux sources).
        """
        if before is None or after is None or len(before) != len(after):
            return None
        total = 0
        for zone, was, now in zip(self.zones, before, after, strict=True):
            total += now - was if now >= was else now - was + int((zone / "max_energy_range_uj").read_text())
        return total / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class Meter:
    """Measures a block of any length: ``with Meter() as m: ...``, then ``m.joules``; None where the machine cannot tell."""

    def __init__(self, counters: Counters | None = None, often: float = OFTEN) -> None:
        self.counters, self.often = counters or Counters(), often
        self.joules: float | None = None
        self._last: list[int] | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._last = self.counters.read()
        if self._last is not None:
            self.joules = 0.0
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self.often):
            self._look()

    def _look(self) -> None:
        now = self.counters.read()
        more = self.counters.joules(self._last, now)
        self.joules = None if more is None or self.joules is None else self.joules + more
        self._last = now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._look()
