"""Options that every experiment sets, alone and with many kinds of words, as compositions.json has recorded them.

    python -m tests.config.compositions --write    # record them again, where a change of values is wanted

The record of an experiment has a digest of each option whose value differs from the defaults of the members that it
chooses, so that a new option changes no record: its default is in docs/reference/options.md. `with words` is the digest
of all such options with each kind of words, of the defaults and of every fourth experiment.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.compose import compose
from permafrost.config.sections import experiment_files
from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECORD = Path(__file__).with_suffix(".json")
NAMED_BY_USERS = {"variants", "grid", "report.columns", "evaluate.group_sets"}
"""Options that are mappings, whose names users choose."""
WORDS = {
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
            "variants={a: [method=kd, method.tau=2], b_c: [method=labels]}",
            "grid={method.tau: [1, 2.5, 1e-3]}",
            "evaluate.group_sets={a: [1], b: [0, 2]}",
        ],
    ),
    "nulls": (
        "sweep",
        ["subset.shots=null", "select=null", "augment.size=null", "store.cache=null"],
    ),
    "quoted texts": ("sweep", ["store.path='/a b/c'", 'run="x y"', "select='holdout.accuracy'"]),
    "odd paths": ("sweep", ["store.path=/a (b)/c,d#e=f", "run=ü/日本", "store.cache=C:\\x\\"]),
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
            *("store=webdataset", "annotate.outputs=[logits,maps]", "explainer=gradcam"),
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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten sections to options with dots in their names; mappings that users name, such as variants, are a value."""
    options = {}
    for name, value in values.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in NAMED_BY_USERS:
            options |= flat(value, f"{prefix}{name}.")
        else:
            options[f"{prefix}{name}"] = value
    return options


@cache
def usual_values(kinds: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Return the default of each option where these sections have members of other kinds."""
    sections: dict[str, Any] = {}
    for name, kind in kinds:
        section = sections
        for part in name.split("."):
            section = section.setdefault(part, {})
        section["kind"] = kind
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "members.yaml"
        path.write_text(json.dumps(sections))
        return flat(compose("sweep", [f"experiment={path}"]))


def differences(verb: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the options that words set to another value than the defaults of the members that they choose."""
    options = flat(compose(verb, list(words)))
    first = usual_values(())
    kinds = {name: options[name] for name in options if name.endswith(".kind")}
    chosen = {name: kind for name, kind in kinds.items() if kind != first.get(name)}
    usual = usual_values(
        tuple((name.removesuffix(".kind"), kind) for name, kind in sorted(chosen.items()))
    )
    return {
        name: value
        for name, value in sorted(options.items())
        if name in chosen or value != usual.get(name)
    }


def digest(value: Any) -> str:
    """Return the first digits of the SHA-256 of a value as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def with_words(chosen: Sequence[str]) -> dict[str, Any]:
    """Return the options with each kind of words, some of which are refused."""
    options: dict[str, Any] = {}
    for name, (verb, words) in WORDS.items():
        try:
            options[name] = differences(verb, [*chosen, *words])
        except ConfigError:
            options[name] = "refused"
    return options


def record_of(experiment: str) -> dict[str, str]:
    """Return the record of an experiment, of the defaults if it is empty."""
    chosen = [f"experiment={experiment}"] if experiment else []
    values = differences("sweep", chosen)
    if int(digest(experiment), 16) % 4 == 0 or not experiment:
        values["with words"] = with_words(chosen)
    return {option: digest(value) for option, value in values.items()}


def changes() -> list[str]:
    """Name each option of each experiment that has another value than the record."""
    recorded, made = json.loads(RECORD.read_text()), records()
    empty: dict[str, str] = {}
    return [
        f"{experiment or 'the defaults'}: {option}"
        for experiment in sorted(made.keys() | recorded.keys())
        for new, old in [(made.get(experiment, empty), recorded.get(experiment, empty))]
        for option in sorted(new.keys() | old.keys())
        if new.get(option) != old.get(option)
    ]


def records() -> dict[str, dict[str, str]]:
    """Return the records of the defaults and of all experiments."""
    return {name: record_of(name) for name in ("", *experiments())}


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        lines = [f" {json.dumps(name)}: {json.dumps(record)}" for name, record in records().items()]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        print("\n".join(changes()))
