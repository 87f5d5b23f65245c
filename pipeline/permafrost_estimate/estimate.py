"""Estimate the bytes and hours of a store before it is made, and when it pays, from a sample of its records.

    permafrost estimate experiment=demo
    permafrost estimate data=image_folder data.path=photos teacher=torchvision teacher.name=resnet50 \\
        teacher.weights=resnet50.pth teacher.input_size=224 estimate.records=1281167 estimate.workers=[1,8,64]
    permafrost estimate store.path=stores/demo teacher=none
    permafrost estimate data=image_folder data.path=photos store.path=stores/photos store.append=true teacher=...

It takes the options of precompute; with store.append=true it says what new records cost, and all of them anew. A few
shards are packed, annotated and trained on in a temporary folder. Each range in parentheses is the lowest and the
highest of what was measured.

Reads   the data, or only the store at <store.path> if it is finished, unless store.append=true, and the weights
Writes  runs/<run>/estimate.json; nothing to <store.path>
Rerun   the same command measures again, on the same records
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from permafrost.config.data import NoDataConfig
from permafrost.config.models import NoModelConfig
from permafrost.core.digests import plain_values
from permafrost.core.errors import UserError, require
from permafrost.runs.folder import RunFolder
from permafrost.storage.files import file_at
from permafrost.store.manifest import MANIFEST_NAME
from permafrost_estimate.measurement import Estimate, printed_lines
from permafrost_estimate.options import EstimateConfig

logger = logging.getLogger("permafrost.estimate")


@dataclass(frozen=True, kw_only=True)
class EstimateResult:
    """The estimate, its lines for the terminal, and the file that has it as JSON."""

    estimate: Estimate
    lines: dict[str, str] = field(default_factory=dict)
    file: str = ""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        return {**self.lines, "file": self.file}


def estimate_store(config: EstimateConfig) -> EstimateResult:
    """Measure a sample in a temporary folder, which is removed, and write the estimate.

    Raises:
        ConfigError: If there are neither data nor a finished store.
    """
    finished = file_at(config.store.folder / MANIFEST_NAME).exists() and not config.store.append
    require(
        finished or not isinstance(config.data, NoDataConfig),
        f"store.path={config.store.path} holds no finished store; name the data to estimate with data=, as in "
        "data=image_folder data.path=photos, or correct store.path",
    )
    require(
        not config.store.teacher,
        "store.teacher names a pass that is finished, and an estimate is of one that is made; name its network by "
        "teacher= and teacher.weights=, and compare students on the pass with permafrost sweep",
    )
    _announce(config, finished)
    from permafrost_estimate.measurement import measure  # imports torch

    with tempfile.TemporaryDirectory(prefix="permafrost-estimate-") as folder, _quiet():
        try:
            estimate = measure(config, Path(folder))
        except UserError as error:  # about the sample
            error.args = (re.sub(rf"{re.escape(folder)}/\w+", config.store.path, str(error)),)
            raise
    file = ""
    if config.run:
        path = RunFolder(config.run).path / "estimate.json"
        file_at(path).write((json.dumps(plain_values(asdict(estimate)), indent=1) + "\n").encode())
        file = str(path)
    return EstimateResult(estimate=estimate, lines=printed_lines(estimate, config), file=file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the parts of precompute from announcing their work, which is on a temporary store."""
    precompute = logging.getLogger("permafrost.precompute")
    before = precompute.level
    precompute.setLevel(logging.WARNING)
    try:
        yield
    finally:
        precompute.setLevel(before)


def _announce(config: EstimateConfig, finished: bool) -> None:
    """Log what this call will measure, and on what."""
    options = config.estimate
    most = "all" if options.shard_records is None else f"at most {options.shard_records:,}"
    teacher = (
        "no teacher"
        if isinstance(config.teacher, NoModelConfig)
        else f"teacher {config.teacher.label} ({', '.join(config.annotate.outputs)}), then "
        f"{options.rounds} steps of student {config.student.label}, "
        f"method={config.method.kind}, with stored and with live targets"
    )
    logger.info(
        "measuring %d shards, %s records of each, of %s; %s; in a temporary folder",
        options.shards,
        most,
        f"the finished store {config.store.path}" if finished else f"data={config.data.kind}",
        teacher,
    )
