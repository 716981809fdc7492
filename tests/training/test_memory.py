"""Whether memory that is freed goes back, looked at in processes of their own: the setting cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys, psutil, torch
from torch import nn
from mmcompress.training import memory

memory.LARGE_BYTES = int(sys.argv[1])
print(memory.give_back_blocks(nn.Linear(64, 64)))
# As a training leaves its heap: large blocks (glibc's limit rises to their size), and among them small ones that stay.
for _ in range(2):
    del [torch.ones(6_000_000)][0]
before = psutil.Process().memory_info().rss
blocks, small = [], []
for _ in range(80):
    blocks.append(torch.ones(500_000))
    small.append(torch.ones(1_000))
blocks.clear()
print(psutil.Process().memory_info().rss - before)
"""


def left(large_bytes: int, **said: str) -> tuple[str, int]:
    """What was answered, and how many bytes of 160 MB are still held after they were freed."""
    env = {name: value for name, value in os.environ.items() if name not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")}
    words = [sys.executable, "-c", SCRIPT, str(large_bytes)]
    done = subprocess.run(words, env={**env, **said}, capture_output=True, text=True, check=True)
    answer, held = done.stdout.split()
    return answer, int(held)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_large_model_s_blocks_go_back_and_a_small_one_s_need_not() -> None:
    assert left(10**9)[0] == "False"
    assert left(10**9)[1] > 100e6  # what this is about
    answer, held = left(0)
    assert answer == "True"
    assert held < 20e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_the_user_says_about_memory_stays() -> None:
    assert left(0, MALLOC_MMAP_THRESHOLD_="33554432")[0] == "False"
