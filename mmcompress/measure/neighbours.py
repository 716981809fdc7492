"""What else the machine does while a model is timed."""

from __future__ import annotations

import time

import psutil


class Neighbours:
    """How much of the machine other programs used since this was made.

    A steady neighbour leaves no trace in the spread of the times: it makes all of them slow, and thread pools that wait for a
    core that is taken make them many times slower. So the processor time that was used and was not ours is looked at.
    """

    def __init__(self) -> None:
        self.start, self.machine, self.own = time.perf_counter(), self._machine(), time.process_time()

    def busy_cores(self, timed_seconds: float) -> float:
        """Cores that were busy with something else, on average; 0 on an idle machine.

        Args:
            timed_seconds: processor time of the processes that were timed meanwhile; what this process used is known here.
        """
        seconds = time.perf_counter() - self.start
        used = self._machine() - self.machine - (time.process_time() - self.own) - timed_seconds
        return max(0.0, used / seconds)

    def _machine(self) -> float:
        """Seconds of all cores that were not idle, time that a hypervisor took away included."""
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
