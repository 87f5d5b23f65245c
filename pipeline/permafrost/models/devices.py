"""Resolution of device options."""

from __future__ import annotations

import torch

from permafrost.core.errors import ConfigError


def resolve_device(option: str, name: str) -> torch.device:
    """Return the device that an option names. `auto` selects a GPU if one is available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{option}={name} is not available ({error}); set it to auto or to another device"
        ) from error
    return device
