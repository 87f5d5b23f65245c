"""State of the process that a verb must leave as it was."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

OF_LIBRARIES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that pytest and torch set as they are imported."""


def state_of_process():
    """Return threads, generators, dtypes and the like by name."""
    mask = os.umask(0)
    os.umask(mask)
    numpy_state = np.random.get_state()
    return {
        "threads of torch": torch.get_num_threads(),
        "generator of torch": torch.get_rng_state().tolist(),
        "generator of NumPy": (numpy_state[1].tolist(), numpy_state[2:]),
        "generator of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomalies": torch.is_anomaly_enabled(),
        "folder": Path.cwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in OF_LIBRARIES},
        "signals": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        "umask": mask,
        "warnings": [
            each for each in warnings.filters if each[2].__module__ == "builtins" and not each[3]
        ],
        "path": list(sys.path),
        "standard streams": (sys.stdin, sys.stdout, sys.stderr),
        "recursion": sys.getrecursionlimit(),
        "floating point": np.geterr(),
    }


@contextmanager
def unchanged_process():
    """Require that the process is afterwards as it was."""
    before = state_of_process()
    yield
    after = state_of_process()
    assert [what for what in before if before[what] != after[what]] == []
