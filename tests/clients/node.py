"""transformers.js under Node: installing it once, and asking it what it makes of a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

PACKAGE = "@huggingface/transformers@4"
WHERE = "MMCOMPRESS_TRANSFORMERS_JS"
"""Names a folder that the package is installed in already; else it is installed below the Python environment."""
CLIENT = Path(__file__).parent / "client.mjs"
OLDEST_NODE = 18


def packages() -> Path:
    """The folder that transformers.js is installed in; skips the test where there is none and none can be had."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed: transformers.js is not tried")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.match(r"v(\d+)", said)
    if version is None or int(version[1]) < OLDEST_NODE:
        pytest.skip(f"Node is {said.strip()}: transformers.js needs {OLDEST_NODE} or newer")
    if os.environ.get(WHERE):
        return Path(os.environ[WHERE])
    folder = Path(sys.prefix) / "node" / "transformers-js"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (folder / ".ready").exists():
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed: transformers.js cannot be had")
    (folder / "package.json").write_text('{"private": true}\n')
    # Scripts stay off: the package brings its CPU runtime along, and the scripts only fetch GPU libraries.
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=1", "--loglevel=error"]
    done = subprocess.run([npm, "install", *quiet, PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"npm could not install {PACKAGE} (offline?): {last}")
    (folder / ".ready").touch()


def ask(folder: Path, does: str, **job: Any) -> Any:
    """What ``client.mjs`` says of a model folder; ``does`` is one of its actions."""
    told = {"packages": str(packages()), "models": str(folder.parent), "model": folder.name, "does": does, **job}
    done = subprocess.run(["node", str(CLIENT)], input=json.dumps(told), capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"transformers.js failed on {folder.name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def arrays(outputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Tensors as the client prints them, as arrays by name."""
    return {name: array(one) for name, one in outputs.items()}


def array(tensor: Mapping[str, Any]) -> NDArray[Any]:
    """One of them."""
    return np.asarray(tensor["data"], dtype=tensor["type"]).reshape(tensor["dims"])
