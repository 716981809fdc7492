"""A float file as the quantizers take it, made once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from mmcompress.quantization import onnx_graph


class Prepared:
    """What `onnx_graph.prepare` makes of a float file, when it is first asked for; quantizers leave it as it is."""

    def __init__(self, source: Path, folder: Path) -> None:
        """Makes nothing yet.

        Args:
            source: Float file, as `export_component` writes it.
            folder: Where files go, and where they have to stay while they are used.
        """
        self.source, self._folder = source, folder

    @cached_property
    def float_bytes(self) -> int:
        """Size of the float file with its weights."""
        return onnx_graph.file_bytes(self.source)

    def file(self, *, patches: bool = True) -> Path:
        """The file; convolutions over patches are products of matrices where ``patches``."""
        path = self._folder / ("prepared.onnx" if patches else "prepared-convolutions.onnx")
        if not path.exists():
            onnx_graph.prepare(self.source, path, patches=patches)
        return path


@contextmanager
def prepared(source: Path | Prepared) -> Iterator[Prepared]:
    """One that was made before, or one that is removed afterwards."""
    if isinstance(source, Prepared):
        yield source
        return
    with TemporaryDirectory(prefix="mmcompress-") as scratch:
        yield Prepared(source, Path(scratch))
