"""Check every byte, count, key and value of a store against its manifests.

    python -m stages.verify experiment=demo
    python -m stages.verify store.path=stores/demo
    python -m stages.verify experiment=demo equivariance=true

With equivariance=true the teacher is asked again on views of some records, one kind of augmentation at a time:
how far its answers there are from the stored ones, map moved along, says what frozen targets cost.

Reads   <store.path>, all of it; with equivariance=true the teacher's weights
Writes  nothing; prints a line for each problem, and the exit code is 1 if there is any
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import main
from pipeline.config.models import NoModelConfig
from pipeline.core.errors import UserError
from pipeline.core.files import sha256_json
from pipeline.models.resolve import require_images
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store

if TYPE_CHECKING:
    from pipeline.config.models import ModelConfig
    from pipeline.config.verbs import VerifyConfig


class DamagedStoreError(UserError):
    """A store in which something is not what its manifests say."""


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was found in order."""

    verified_records: int
    verified_passes: int
    equivariance: str = ""
    """A line a kind of operation."""


def run(config: VerifyConfig) -> VerifyResult:
    """Check the whole store; DamagedStoreError names every problem."""
    path = Path(config.store.path)
    problems = list(verify_store(path))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise DamagedStoreError(
            f"{len(problems)} problem(s) in {path}:\n{listed}\n"
            "to repair a file of the store, delete it and run stages.precompute again (for a folder of artifacts/ "
            "what made it); a file outside the store is yours to restore"
        )
    store = Store(path)
    passes = [*store.pass_folders(), *store.pass_folders(stored_views=True)]
    return VerifyResult(
        verified_records=store.index.num_rows,
        verified_passes=len(passes),
        equivariance=_equivariance(config, store, config.teacher)
        if config.equivariance and not isinstance(config.teacher, NoModelConfig)
        else "",
    )


def _equivariance(config: VerifyConfig, store: Store, teacher: ModelConfig) -> str:
    import numpy as np

    from pipeline.core.devices import resolve_device
    from pipeline.evaluation.equivariance import measure_equivariance
    from pipeline.loading.dataset import StoreDataset
    from pipeline.loading.selection import rows_of_split
    from pipeline.models.explainers.explain import EXPLAINERS
    from pipeline.models.fingerprint import describe_teacher
    from pipeline.models.providers import build_model, freeze, teacher_input_size

    require_images(store, "equivariance=true", "verify it without")
    num_classes = len(store.manifest.classes)
    asked = sha256_json(describe_teacher(teacher, num_classes, config.annotate.precision))
    passes = [store.open_pass(folder.name) for folder in store.pass_folders()]
    taught = [
        t
        for t in passes
        if sha256_json(t.manifest.teacher) == asked and t.explainer == config.explainer.kind
    ]
    if not taught:
        raise StoreMismatchError(
            f"{store.path} holds no pass of this teacher and explainer={config.explainer.kind}; it holds: "
            + ", ".join(t.name for t in passes)
        )
    rows = rows_of_split(store.index, config.split)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[: config.equivariance_records])
    side = teacher_input_size(teacher)
    measured = measure_equivariance(
        freeze(build_model(teacher, num_classes)).to(resolve_device("device", "auto")),
        EXPLAINERS[config.explainer.kind],
        store.size if side is None else (side, side),
        StoreDataset(store, chosen, taught[:1]),
        config.augment.operations,
    )
    lines = [
        f"  {kind:16s} map cosine {values['map_cosine']:.4f}  KL {values['logits_kl']:.4f}  "
        f"top-1 agrees {values['top1_agreement']:.3f}"
        for kind, values in measured.items()
    ]
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    main("verify", run, __doc__)
