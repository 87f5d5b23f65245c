"""Settings of torch in a process that a notebook or another program has changed, put aside while a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Run the block with gradients, in float32, without autocast, and put the process's settings back afterwards.

    Torch is not imported: a process that has not imported it has not changed it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
