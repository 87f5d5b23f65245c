"""Memory allocator of the C library, set so that memory of large tensors is used again.

glibc maps large blocks anew and returns free memory to the system, which clears it page by page when it is used again.
On a CPU that takes as long as the convolutions of a small network: the pass of a ResNet-20 is 1.6 times as fast without
(docs/results/benchmarks.md), with the same peak of memory.
"""

from __future__ import annotations

import ctypes
import os

_KEPT_BYTES = 2**30
"""Size up to which blocks are taken from memory that is kept, and of free memory that is kept."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
}
"""Variables that do the same for a process that is started with them."""


def keep_freed_memory() -> None:
    """Set the allocator of this process and of those that it starts, unless the user's environment sets it.

    Other C libraries than glibc are left as they are.
    """
    if any(name in os.environ for name in ALLOCATOR_ENVIRONMENT):
        return
    os.environ.update(ALLOCATOR_ENVIRONMENT)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
