"""The processes of a run that trains data-parallel: who is the main one, and what it tells the others.

``torchrun`` and ``accelerate launch`` start the same command several times and say in the environment who is who. Every process
takes part in the passes that train. All else, measuring and writing among it, the main process does alone, and the others wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from mmcompress.errors import ProcessError, UnavailableError

_alone = False

PATIENCE = timedelta(days=7)
"""How long a process waits for another: the main one may measure for hours. If one dies, the launcher ends all."""

GRACE_SECONDS = 5.0
"""Where the main process has ended, the others wait for so long: the launcher ends all as soon as one fails, and the main one
may still have to say why it did."""


def count() -> int:
    """How many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0, the main one."""
    return int(os.environ.get("RANK", "0"))


def is_alone() -> bool:
    """Whether there is no other process, or none that takes part in what this one does now."""
    return _alone or count() == 1


@contextmanager
def alone() -> Iterator[None]:
    """In the block this process does what the others take no part in."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def joined() -> Iterator[None]:
    """Lets the processes find each other, on GPUs by NCCL, each with its own, and by gloo elsewhere; alone it does nothing.

    Raises:
        UnavailableError: there are fewer GPUs than processes on this machine.
        ProcessError: another process ended while this one waited for it.
    """
    if count() == 1:
        yield
        return
    import torch  # a process that is alone need not load it here
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= there:
            raise UnavailableError(f"more processes than the {there} GPUs of this machine; start one for each (--nproc_per_node)")
        torch.cuda.set_device(place)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as e:
        # gloo's errors have no class of their own, but name its source files.
        if isinstance(e, distributed.DistError) or "/gloo/" in str(e):
            if rank():
                time.sleep(GRACE_SECONDS)
            raise ProcessError("another of the processes ended; what it said is above, or in its own machine's output") from e
        raise
    finally:
        distributed.destroy_process_group()


def tell(message: Any) -> None:
    """The main process says to all others what comes next; the message is text, a number or a list of these."""
    if count() > 1:
        _broadcast(message)


def told() -> Any:
    """What the main process says, once it does."""
    return _broadcast(None)


def _broadcast(message: Any) -> Any:
    import json

    import torch
    from torch import distributed

    # As JSON in a tensor: broadcast_object_list would pickle.
    data = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    distributed.broadcast(size, 0)
    if rank():
        data = torch.empty(int(size), dtype=torch.uint8)
    distributed.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))
