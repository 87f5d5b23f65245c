"""Arrow files that are mapped into memory, and files that Arrow writes without copies of whole buffers."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from permafrost.core.files import map_file

if TYPE_CHECKING:
    import io

    from permafrost.core.files import HashingFile

_PIECE = 2**20
_MARK = b"ARROW1\0\0"
"""Beginning of an Arrow file; a stream of messages follows."""


def map_arrow(file: io.FileIO) -> pa.RecordBatchFileReader:
    """Map an open Arrow file into memory. Its batches lie in the mapped pages, which outlive the file's descriptor.

    Arrow's own memory map would start threads (see parquet.read_table). Raises ValueError or pa.ArrowException if it
    is not an Arrow file.
    """
    options = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_file(pa.py_buffer(map_file(file)), options=options)


def map_batch(file: io.FileIO, schema: pa.Schema) -> pa.RecordBatch:
    """Map the only batch of an open Arrow file into memory. It lies in the mapped pages and takes no other memory.

    The messages are looked at before they are read, because compressed buffers would be decompressed into memory of any
    size, and NumPy has no view of a column with nulls. Raises ValueError, with the reason, or pa.ArrowException.
    """
    data = pa.py_buffer(map_file(file))
    if data.size < len(_MARK) or data.slice(0, len(_MARK)).to_pybytes() != _MARK:
        raise ValueError("it does not begin as an Arrow file")
    stream = data.slice(len(_MARK))
    kinds = []
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)):
        kinds.append(message.type)
        if message.type != "schema":
            _require_plain(message)
    if kinds.count("record batch") != 1 or kinds[-1] != "record batch":
        raise ValueError(f"it has {kinds.count('record batch')} batches, not one")
    options = pa.ipc.IpcReadOptions(use_threads=False)
    reader = pa.ipc.open_stream(pa.BufferReader(stream), options=options)
    if not reader.schema.equals(schema):
        raise ValueError("it does not have the columns of this version")
    return reader.read_next_batch()


def _require_plain(message: pa.ipc.Message) -> None:
    """Raise ValueError unless the arrays of a message are neither compressed nor have nulls.

    pyarrow does not show either, so both are read from the message (Message.fbs of Arrow's format). It is a flatbuffer,
    which pyarrow has verified: a table begins with the distance to the positions of its fields.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        positions = table - int(struct.unpack_from("<i", data, table)[0])
        (size,) = struct.unpack_from("<H", data, positions)
        at = 4 + 2 * number
        offset = struct.unpack_from("<H", data, positions + at)[0] if at < size else 0
        return table + int(offset) if offset else 0

    def target(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    batch = target(field(target(0), 2))  # Message.header
    if message.type == "dictionary":
        batch = target(field(batch, 1))  # DictionaryBatch.data
    if field(batch, 3):  # RecordBatch.compression
        raise ValueError("its buffers are compressed")
    nodes = target(field(batch, 1)) if field(batch, 1) else 0
    count = struct.unpack_from("<I", data, nodes)[0] if nodes else 0
    for number in range(count):
        _, null_count = struct.unpack_from("<qq", data, nodes + 4 + 16 * number)
        if null_count:
            raise ValueError("it has empty cells")


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
