"""The device that an option names."""

from __future__ import annotations

import torch

from pipeline.core.errors import ConfigError


def resolve_device(option: str, name: str) -> torch.device:
    """The device that an option names; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{option}={name} cannot be used here: {error}") from error
    return device
