"""Whether freed memory goes back to the kernel when it should, in processes of their own: a setting cannot be undone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

SAID = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
BEGIN = """
import resource, sys, psutil
import numpy as np
from mmcompress import heap

def ones(count):
    return np.ones(count, np.float32)

def held():
    return psutil.Process().memory_info().rss

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""
LARGE = """
print(heap.give_back_blocks(int(sys.argv[1])))
# As a training leaves its heap: large blocks (glibc's limit rises to their size), and among them small ones that stay.
for _ in range(2):
    del [ones(6_000_000)][0]
before = held()
blocks, small = [], []
for _ in range(80):
    blocks.append(ones(500_000))
    small.append(ones(20_000))  # too large for holes elsewhere: they keep what lies below them
blocks.clear()
print(held() - before)
"""
SMALL = """
def steps():
    "Pages that the kernel gave for ten times the same 160 MB."
    before = faults()
    for _ in range(10):
        blocks = [ones(4_000_000) for _ in range(10)]
        del blocks
    return faults() - before

heap.give_back_blocks(int(sys.argv[1]))
plain, before = steps(), held()
with heap.keeping_blocks() as kept:
    print(kept)
    steps()
    print(steps(), held() - before > 100e6)
print(held() - before < 20e6, steps() > 0.5 * plain)
"""


def answers(script: str, weights: int, **said: str) -> list[str]:
    """What the script printed."""
    env = {name: value for name, value in os.environ.items() if name not in SAID}
    words = [sys.executable, "-c", BEGIN + script, str(weights)]
    return subprocess.run(words, env={**env, **said}, capture_output=True, text=True, check=True).stdout.split()


def test_a_large_model_s_blocks_go_back_and_a_small_one_s_need_not() -> None:
    answer, held = answers(LARGE, 10**6)
    assert answer == "False"
    assert int(held) > 100e6  # what this is about
    answer, held = answers(LARGE, 10**9)
    assert answer == "True"
    assert int(held) < 20e6


@pytest.mark.parametrize("weights", [10**6, 10**9])
def test_blocks_are_kept_in_the_block_and_go_back_after_it(weights: int) -> None:
    kept, faults, held, gone, again = answers(SMALL, weights)
    assert kept == "True"
    assert int(faults) < 1000  # of 40,000 pages ten times
    assert held == "True"
    assert gone == "True"
    assert again == "True"


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_what_the_user_says_about_memory_stays(name: str) -> None:
    assert answers(LARGE, 10**9, **{name: "33554432"})[0] == "False"
    assert answers(SMALL, 10**6, **{name: "33554432"})[0] == "False"
