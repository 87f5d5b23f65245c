"""Class embeddings, such as those of the class names by a text encoder, which take the place of one-hot labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from permafrost.core.errors import ConfigError


def load_class_embeddings(evaluator: str, path: str | None, num_classes: int) -> Tensor | None:
    """Load class embeddings f64 [K, e] from a .npy file, None if there is no path.

    evaluator  name of the evaluator whose option `embeddings` is the path, for messages
    """
    if path is None:
        return None
    option = f"evaluate.{evaluator}.embeddings={path}"
    if not Path(path).is_file():
        raise ConfigError(
            f"{option} does not exist; correct the path, or set it to null for one-hot"
        )
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(
            f"{option} is not a .npy file of numbers ({error}); write it with numpy.save"
        ) from error
    if not isinstance(values, np.ndarray):
        raise ConfigError(f"{option} holds several arrays; write one of them with numpy.save")
    if values.ndim != 2 or len(values) != num_classes:
        raise ConfigError(
            f"{option} has shape {values.shape}; it must have one row for each of the {num_classes} classes, in order"
        )
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ConfigError(
            f"{option} has values of type {values.dtype} that are not all finite numbers; write float32"
        )
    return torch.from_numpy(values.astype(np.float64))
