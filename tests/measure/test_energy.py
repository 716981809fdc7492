"""Energy counters in a made-up folder of Linux's power zones."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mmcompress.measure.energy import Counters, Meter


def zone(root: Path, name: str, kind: str, energy: int, most: int = 1_000_000) -> Path:
    place = root / name
    place.mkdir(parents=True)
    (place / "name").write_text(kind + "\n")
    (place / "energy_uj").write_text(f"{energy}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")
    return place


def test_packages_are_added_and_come_round(tmp_path: Path) -> None:
    """The first goes from 100 to 400 microjoules; the second from 999,000 over its end at 1,000,000 to 2,000: 3,000."""
    one, two = zone(tmp_path, "intel-rapl:0", "package-0", 100), zone(tmp_path, "intel-rapl:1", "package-1", 999_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)  # a part of the first: it would count twice
    zone(tmp_path, "intel-rapl:2", "psys", 7)  # the platform: so would that
    counters = Counters(tmp_path)
    before = counters.read()
    (one / "energy_uj").write_text("400\n")
    (two / "energy_uj").write_text("2000\n")
    assert before == [100, 999_000]
    assert counters.reason == ""
    assert counters.joules(before, counters.read()) == pytest.approx(3300e-6)


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "nothing")
    assert counters.read() is None
    assert counters.joules(None, None) is None
    assert "shows no energy counter" in counters.reason
    with Meter(counters) as meter:
        pass
    assert meter.joules is None


@pytest.mark.skipif(os.name != "posix", reason="needs file permissions")
def test_a_counter_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    read = Path.read_text

    def refused(path: Path, *given: str, **more: str) -> str:
        if path == place / "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *given, **more)

    monkeypatch.setattr(Path, "read_text", refused)  # root may read everything, so the mode alone would test nothing there
    assert "may not be read by this user" in Counters(tmp_path).reason


def test_a_long_piece_of_work_is_looked_at_in_between(tmp_path: Path) -> None:
    """Two laps of the counter would be lost if only both ends were looked at."""
    place = zone(tmp_path, "intel-rapl:0", "package-0", 0, most=1000)
    looks: list[int] = []

    class Watched(Counters):
        def read(self) -> list[int] | None:
            looks.append(1)
            (place / "energy_uj").write_text(str((600 * (len(looks) - 1)) % 1000))
            return super().read()

    with Meter(Watched(tmp_path), often=0.001) as meter:
        while len(looks) < 6:
            time.sleep(0.001)
    assert meter.joules == pytest.approx(600e-6 * (len(looks) - 1))
