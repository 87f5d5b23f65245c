"""Arrow files that are mapped into memory, and files that Arrow writes without copies of whole buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.core.files import map_file

if TYPE_CHECKING:
    import io

    from pipeline.core.files import HashingFile

_PIECE = 2**20


def map_arrow(file: io.FileIO) -> pa.RecordBatchFileReader:
    """Map an open Arrow file into memory. Its batches lie in the mapped pages, which outlive the file's descriptor.

    Arrow's own memory map would start threads (see parquet.read_table). Raises ValueError or pa.ArrowException if it
    is not an Arrow file.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_file(pa.py_buffer(map_file(file)), options=options)


def arrow_sink(file: HashingFile) -> pa.NativeFile:
    """Return a file for Arrow's writers that passes large buffers on in pieces, without copying them whole."""
    return pa.PythonFile(_Pieces(file), mode="w")


class _Pieces:
    """File that receives a large buffer in pieces."""

    closed = False

    def __init__(self, file: HashingFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _PIECE):
            self._file.write(bytes(whole[start : start + _PIECE]))
        return len(whole)

    def flush(self) -> None:
        """Do nothing; the atomic file flushes itself."""

    def tell(self) -> int:
        return int(self._file.tell())
