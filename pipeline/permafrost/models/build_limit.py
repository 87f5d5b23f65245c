"""Limit of what the construction of a trained network allocates, by the tensors that its weights have.

The description of a trained network (model.json) states its sizes, and another file carries its weights. A network of
sizes that the weights do not have is refused before it fills the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from permafrost.core.errors import first_line
from permafrost.models.classifier import WeightsError
from permafrost.storage.untrusted import FormatError, tensor_shapes

_TIMES = 4
"""Numbers that a construction may allocate for each one of the weights, as it may replace layers."""
_MORE_NUMBERS = 2**24
"""Numbers beyond that, such as tables that a network computes from its options."""
_MORE_TENSORS = 20_000


@contextmanager
def limited_construction(weights: Path) -> Iterator[None]:
    """Have a network that is built in the block allocate little more than its weights do.

    Args:
        weights: File of safetensors that a run has written.

    Raises:
        WeightsError: If the file cannot be read, or the network allocates more or cannot be built.
    """
    try:
        shapes = tensor_shapes(weights)
    except FormatError as error:
        raise WeightsError(f"{weights} cannot be read as weights ({error}); restore it") from error
    try:
        with _Limit(weights, shapes):
            yield
    except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"the network of {weights} cannot be built from its description ({first_line(error)}); use the versions of "
            "permafrost and its packages that wrote it"
        ) from error


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that creates no tensors beyond a number of them, or with too many numbers in total."""

    def __init__(self, weights: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self._stored = sum(map(math.prod, shapes.values()))
        self._numbers = _TIMES * self._stored + _MORE_NUMBERS
        self._tensors = _TIMES * len(shapes) + _MORE_TENSORS

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, as torch would import its compiler for a mode that it skips, which takes two seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str((kwargs or {}).get("device")) != "meta" and args and not isinstance(args[0], Tensor):
            self._count(args[0] if isinstance(args[0], (list, tuple)) else args)
        return func(*args, **(kwargs or {}))

    def _count(self, sizes: Sequence[Any]) -> None:
        """Count a tensor that is to be created. Raises WeightsError."""
        lengths = [size for size in sizes if isinstance(size, int)]
        self._numbers -= math.prod(lengths)
        self._tensors -= 1
        if min(self._numbers, self._tensors) < 0:
            shape = f", of which one is {lengths}" if self._tensors >= 0 else ""
            raise WeightsError(
                f"{self._weights} does not fit its network: the file has {self._stored:,} numbers, but the sizes in "
                f"model.json next to it need many more{shape}; restore both files of the run"
            )
