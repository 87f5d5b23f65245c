"""Values of every experiment with many kinds of words, as compositions.json has recorded them.

    python -m tests.config.compositions --write    # record them again, where a change of values is wanted

Each entry is the first half of the SHA-256 of all composed sections as JSON with sorted keys, or `refused`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from permafrost.config.compose import compose
from permafrost.config.sections import experiment_files
from permafrost.core.errors import ConfigError

RECORD = Path(__file__).with_suffix(".json")
WORDS = {
    "nothing": ("sweep", []),
    "members": (
        "sweep",
        ["method=kd", "student=torchvision", "optimizer=sgd", "augment=resized_crop_flip"],
    ),
    "members within a section": (
        "teach",
        ["teaching=labels", "teaching.augment=pad_crop_flip", "teaching.optimizer=sgd"],
    ),
    "a value before its member": (
        "sweep",
        ["method.tau=4", "method=kd", "trainer.epochs=3", "trainer.epochs=5"],
    ),
    "lists": (
        "sweep",
        [
            *("seeds=[4,5]", "evaluate.splits=[test]", "evaluators=[accuracy,shift]"),
            *("augment.operations=[{kind: horizontal_flip, p: 0.25}]", "store.teacher=[]"),
        ],
    ),
    "mappings": (
        "sweep",
        [
            "arms={a: [method=kd, method.tau=2], b_c: [method=labels]}",
            "grid={method.tau: [1, 2.5, 1e-3]}",
            "evaluate.group_sets={a: [1], b: [0, 2]}",
        ],
    ),
    "nulls": (
        "sweep",
        ["subset.shots=null", "select=null", "augment.size=null", "store.cache=null"],
    ),
    "quoted texts": (
        "sweep",
        ["store.path='/a b/c'", 'run="x y"', "select='holdout.accuracy'"],
    ),
    "odd paths": (
        "sweep",
        ["store.path=/a (b)/c,d#e=f", "run=ü/日本", "store.cache=C:\\x\\"],
    ),
    "numbers": (
        "sweep",
        [
            *("optimizer.lr=1e-3", "optimizer.weight_decay=0.5"),
            *("trainer.epochs=7", "trainer.clip_norm=2"),
        ],
    ),
    "a date": ("sweep", ["run=2026-11-25"]),
    "true and false": ("sweep", ["trainer.channels_last=true", "store.allow_links=false"]),
    "the options of a report": (
        "report",
        ["report.columns={f1: test.f1}", "report.title=a: b, c", "report.compared_column=f1"],
    ),
    "a new pass": (
        "precompute",
        [
            *("data=image_folder", "data.path=/x", "teacher=timm", "teacher.name=resnet18"),
            *("store=webdataset", "annotate.payloads=[logits,map]", "explainer=gradcam"),
            *("cluster=existing", "executor=ray"),
        ],
    ),
    "options of evaluators": (
        "evaluate",
        ["evaluate.knn.k=7", "evaluate.shift.pixels=4", "model=teacher"],
    ),
}


def experiments() -> list[str]:
    """Return the names of all experiments."""
    return sorted(experiment_files())


def digest(verb: str, words: list[str]) -> str:
    """Return the digest of a composition."""
    try:
        values = compose(verb, words)
    except ConfigError:
        return "refused"
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def digests(experiment: str) -> dict[str, str]:
    """Return the digest of an experiment, of the defaults if it is empty, with each kind of words."""
    chosen = [f"experiment={experiment}"] if experiment else []
    return {name: digest(verb, [*chosen, *words]) for name, (verb, words) in WORDS.items()}


if __name__ == "__main__":
    made = {name: digests(name) for name in ("", *experiments())}
    if "--write" in sys.argv[1:]:
        RECORD.write_text(json.dumps(made, indent=1) + "\n")
    else:
        print(json.dumps(made, indent=1))
