"""Untrusted torch files, unpickled in a separate process.

The process reads with `weights_only` and a list of what may be built, so that no code of a file runs. Files of a
protocol that `weights_only` does not read are unpickled as lists and numbers, of Python and NumPy, alone. The process
may allocate a limited amount of memory besides its libraries, and is ended if a file takes too long. What it returns
are JSON values and arrays. The same file is the program of that process, which knows nothing of this project.

    request   8 bytes of length, then the bytes of the torch file
    answer    8 bytes of length, then JSON: {"error": text}, or {"content": ..., "arrays": [[dtype, shape], ...]}
              8 bytes of length, then the bytes of all arrays, one after the other
"""

from __future__ import annotations

import atexit
import io
import json
import math
import os
import pickle
import select
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from permafrost.core.errors import require

MEMORY_BYTES = 2**30
"""Memory that a file may take in addition to the libraries."""
SECONDS = 60.0
"""Seconds that a file may take."""
_START_SECONDS = 300.0
_MAX_ANSWER = 2**29
_MAX_DEPTH = 12
_ARRAY = "__array__"
_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


class UnpicklingError(ValueError):
    """File that cannot be read without running its code, or within the limits."""


class _EndedError(UnpicklingError):
    """File that ended its process, or must end it."""


# ---- driver --------------------------------------------------------------------------------------


class _Worker:
    """Process that unpickles one file after the other."""

    def __init__(self) -> None:
        program = [sys.executable, "-P", str(Path(__file__)), str(MEMORY_BYTES)]
        self.process = subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self.owner = os.getpid()
        self._receive(_START_SECONDS)

    def ask(self, data: bytes) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(len(data).to_bytes(8, "little"))
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _EndedError("the process that reads it has ended") from None
        answer = json.loads(self._receive(SECONDS))
        if "error" in answer:
            raise UnpicklingError(answer["error"])
        body, start, arrays = self._receive(SECONDS), 0, []
        for dtype, shape in answer["arrays"]:
            arrays.append(np.frombuffer(body, dtype, math.prod(shape), start).reshape(shape))
            start += arrays[-1].nbytes
        return _with_arrays(answer["content"], arrays)

    def _receive(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        if (size := int.from_bytes(self._read(8, deadline, seconds), "little")) > _MAX_ANSWER:
            raise _EndedError(f"it holds {size:,} bytes, more than any target")
        return self._read(size, deadline, seconds)

    def _read(self, size: int, deadline: float, seconds: float) -> bytes:
        assert self.process.stdout is not None
        number, parts = self.process.stdout.fileno(), bytearray()
        while len(parts) < size:
            ready, _, _ = select.select([number], [], [], max(0.0, deadline - time.monotonic()))
            require(bool(ready), f"it was not read in {seconds:.0f} seconds", _EndedError)
            if not (data := os.read(number, min(size - len(parts), 2**20))):
                raise _EndedError(
                    f"the process that reads it has ended; it may need more than {MEMORY_BYTES >> 20:,} MiB"
                )
            parts += data
        return bytes(parts)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


_WORKERS: list[_Worker] = []


def unpickle(data: bytes) -> Any:
    """Return the content of a torch file: lists, mappings, numbers, texts, None and arrays.

    Args:
        data: Bytes of the file.

    Raises:
        UnpicklingError: If it cannot be read, would run code, or exceeds a limit.
    """
    if (
        _WORKERS and _WORKERS[-1].owner != os.getpid()
    ):  # of the process that this one was forked from
        _WORKERS.clear()
    if not _WORKERS:
        _WORKERS.append(_Worker())
    worker = _WORKERS[-1]
    try:
        return worker.ask(data)
    except BaseException as error:
        if isinstance(error, _EndedError) or not isinstance(error, UnpicklingError):
            close_unpickler()
        raise


@atexit.register
def close_unpickler() -> None:
    """End the process, which the next file starts again."""
    while _WORKERS:
        if (worker := _WORKERS.pop()).owner == os.getpid():
            worker.close()


def _with_arrays(content: Any, arrays: list[Any]) -> Any:
    if isinstance(content, list):
        return [_with_arrays(item, arrays) for item in content]
    if isinstance(content, dict):
        if _ARRAY in content:
            return arrays[content[_ARRAY]]
        return {name: _with_arrays(value, arrays) for name, value in content.items()}
    return content


# ---- process -------------------------------------------------------------------------------------


def _plain(value: Any, arrays: list[Any], depth: int = 0) -> Any:
    """Return JSON values in which arrays are numbers of a list."""
    import torch

    require(depth <= _MAX_DEPTH, f"it nests more than {_MAX_DEPTH} lists", ValueError)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        require(value.dtype.name in _DTYPES, f"it has an array of {value.dtype}", ValueError)
        arrays.append(np.ascontiguousarray(value))
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, dict):
        return {str(name): _plain(each, arrays, depth + 1) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, arrays, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"it has a {type(value).__name__}")


class _ScalarType:
    """Type of a number of NumPy, by its name alone."""

    def __init__(self, name: str, *flags: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Check that the byte order is that of the name."""
        if ">" in state:
            raise pickle.UnpicklingError(f"Unsupported byte order of {self.name}")


def _scalar(kind: _ScalarType, data: bytes) -> Any:
    """Return a number of NumPy as one of Python."""
    if (dtype := np.dtype(kind.name)).name not in _DTYPES:
        raise pickle.UnpicklingError(f"Unsupported number of type {dtype}")
    return np.frombuffer(data, dtype)[0].item()


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of lists, mappings, numbers and texts alone, the numbers also of NumPy."""

    _NUMBERS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _ScalarType,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._NUMBERS:
            return self._NUMBERS[module, name]
        raise pickle.UnpicklingError(f"Unsupported global {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("Unsupported tensor")


def _load(data: bytes) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):
            raise
    require(data.startswith(b"PK"), "Unsupported protocol of pickle", pickle.UnpicklingError)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _PlainUnpickler(io.BytesIO(archive.read(name))).load()


def _limit(memory: int) -> None:
    """Limit the memory of this process to what it has and `memory` more."""
    import resource

    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123, of Linux alone
        allocated = next((line.split()[1] for line in status if line.startswith("VmData")), "0")
    limit = 1024 * int(allocated) + memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _serve(memory: int) -> None:
    """Answer requests until the standard input ends."""
    import warnings

    import torch
    from numpy._core import multiarray

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not part of the answer
    kinds = ("Float16", "Float32", "Float64", "Int64", "Int32", "Int16", "Int8", "UInt8", "Bool")
    torch.serialization.add_safe_globals(
        [
            np.ndarray,
            np.dtype,
            *(getattr(np.dtypes, f"{kind}DType") for kind in kinds),
            *(
                (function, f"numpy.{core}.multiarray.{function.__name__}")
                for function in (multiarray._reconstruct, multiarray.scalar)
                for core in ("_core", "core")
            ),
        ]
    )

    def send(data: bytes) -> None:
        answers.write(len(data).to_bytes(8, "little"))
        answers.write(data)
        answers.flush()

    if sys.platform == "linux":
        _limit(memory)
    send(b"{}")
    while header := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(int.from_bytes(header, "little"))
        arrays: list[Any] = []
        try:
            content = _plain(_load(data), arrays)
            text = json.dumps(
                {
                    "content": content,
                    "arrays": [[array.dtype.name, array.shape] for array in arrays],
                }
            )
            body = b"".join(array.tobytes() for array in arrays)
        except MemoryError:
            send(json.dumps({"error": "it needs too much memory"}).encode())
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
            text = f"it cannot be read without running its code, or is damaged ({reason[:200]})"
            send(json.dumps({"error": text}).encode())
        else:
            send(text.encode())
            send(body)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
