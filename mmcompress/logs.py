"""Where the words of libraries go: into a log file, never between ours and the reader."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

log = logging.getLogger("mmcompress")


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Python logging and warnings go to a file while the block runs; progress bars of libraries are off."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level, ours = root.level, log.level
    logging.captureWarnings(True)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    # A full disk must not fill the terminal with the logger's own tracebacks; the write that matters fails by itself.
    raising, logging.raiseExceptions = logging.raiseExceptions, False
    silence_libraries()
    try:
        yield
    finally:
        logging.raiseExceptions = raising
        root.removeHandler(handler)
        root.setLevel(level)
        log.setLevel(ours)
        logging.captureWarnings(False)
        handler.close()


def silence_libraries() -> None:
    """Switches the libraries' own progress bars off, and routes their loggers through the root logger."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    datasets.disable_progress_bars()
    datasets.utils.logging.enable_propagation()


@contextmanager
def streams_to(path: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Everything written to stdout and stderr, by C libraries and child processes too, goes to a file.

    Yields:
        The real stdout and stderr, for our own words.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = os.dup(1), os.dup(2)
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    out, err = (os.fdopen(fd, "w", encoding="utf-8", errors="replace", buffering=1) for fd in real)
    warnings.simplefilter("default")
    try:
        yield out, err
    finally:
        for stream in (sys.stdout, sys.stderr, out, err):
            # What is still buffered when the disk is full or the reader is gone is lost, as it would be anywhere.
            try:
                stream.flush()
            except OSError:
                continue
        os.dup2(real[0], 1)
        os.dup2(real[1], 2)
        out.close()
        err.close()
