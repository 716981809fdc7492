"""How long OpenMP threads spin while they wait for each other.

By default libgomp's threads spin for milliseconds. On a machine with nothing else to do that is a little faster; beside a busy
neighbour every parallel region waits for a thread that has lost its core, and training is five times slower. So the command
spins briefly while it trains and scores, and leaves the default to the processes in which latency is measured.
"""

from __future__ import annotations

import os

_VARIABLE, _BRIEFLY = "GOMP_SPINCOUNT", "1000"


def be_polite() -> None:
    """Has OpenMP threads of this process spin briefly, unless the user has said otherwise. Only works before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(_VARIABLE, _BRIEFLY)


def environment_for_timing() -> dict[str, str]:
    """This process's environment as it was before ``be_polite``."""
    return {name: value for name, value in os.environ.items() if (name, value) != (_VARIABLE, _BRIEFLY)}
