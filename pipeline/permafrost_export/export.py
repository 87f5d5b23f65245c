"""Export a student as programs that run without this project: torch.export and ONNX, with all preprocessing.

    permafrost export experiment=demo run=my-student
    permafrost export run=photos export.formats=[torch]

Each program takes the pixels of decoded images and returns logits, or with export.output=pooled the features before the
classifier. It is run once, and must give the network's output up to 1e-4 of the largest one.

Reads   runs/<run>/distill/ and evaluate/, and the size of the frames of <store.path>
Writes  student.onnx (needs the extra `onnx`) and student.pt2, or embedding.onnx and embedding.pt2, and a card README.md
        and predict.py, which runs student.onnx, in runs/<run>/distill/export/, which to=hf://<user>/<name> uploads; a
        timm student is there in timm's form, too
Rerun   the programs are written again
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permafrost.config.version import __version__
from permafrost.core.errors import require
from permafrost.evaluation.results import PICTURE, read_results, stored_thresholds
from permafrost.models.saved import EXPORT_FOLDER, SavedNetwork, TrainedModel
from permafrost.runs.folder import RunFolder
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import name_of_path
from permafrost.store.facts import StoredFacts, read_data_facts, read_sheets
from permafrost.store.reader import Store
from permafrost_export.card import card_of_student
from permafrost_export.hub import repository_of, require_hub, upload_to_hub
from permafrost_export.options import ExportConfig

PROGRAM = "predict.py"
"""Program that runs student.onnx on image files."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Files of the programs by format, and how far their outputs are from the network's."""

    files: dict[str, str]
    largest_difference: float
    card: str
    """File of the card, README.md."""
    uploaded: str = ""
    """Address of the repository of the hub, empty without one."""
    labels: str = ""
    """Probabilities from which classes are predicted, empty with one label per record."""
    next: str = ""
    """Command that runs the program on images."""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        return {
            **self.files,
            "largest_difference": f"{self.largest_difference:.1e}",
            "card": self.card,
            **({"uploaded": self.uploaded} if self.uploaded else {}),
            **({"labels": self.labels} if self.labels else {}),
            "next": self.next,
        }


def export_student(config: ExportConfig) -> ExportResult:
    """Trace the student, and write and check a program of each format."""
    with RunFolder(config.run).files.opened(f"distill/{EXPORT_FOLDER}"):
        return _export(config)


def _export(config: ExportConfig) -> ExportResult:
    from permafrost.models.providers import provider_of
    from permafrost_export import portable

    if config.to:
        require_hub()
        repository_of(config.to)
    student = RunFolder(config.run).path / "distill"
    store = Store(config.store.folder)
    network, trained = SavedNetwork(student).load(store.manifest.classes)
    trained = trained.in_frame(config.export.frame, store)
    picture = str(trained.picture or "")
    if "onnx" in config.export.formats:
        portable.require_onnx()
    program = (
        portable.ImageProgram(network, trained.picture, config.export.output)
        if trained.picture is not None
        else portable.RowProgram(network, config.export.output)
    )
    inputs = portable.sample_inputs(program, store.size[1])
    traced = portable.trace(program, inputs)
    license_of_weights = getattr(trained.config, "license", None)
    require(
        not config.to or bool(license_of_weights),
        f"to={config.to}: the student of run={config.run} names no license, which its card "
        "must have; train it with student.license=",
    )
    kept = read_data_facts(store.folder)
    bit_range = [] if kept is None else [f.value for f in kept.sheet.facts if f.name == "bit_range"]
    facts = {
        "classes": list(trained.classes),
        "run": name_of_path(config.run),
        "input": program.inputs,
        "picture": picture,
        "made_by": f"permafrost {__version__}",
        "bit_range": next(iter(bit_range), "[0, 65535]"),
        "labels": "many" if store.manifest.multi_label else "one",
    } | ({"license": license_of_weights} if license_of_weights else {})
    if store.manifest.multi_label:
        facts["thresholds"] = _thresholds(config, trained)
    files: dict[str, str] = {}
    differences = []
    card = student / EXPORT_FOLDER / "README.md"
    if card.exists() and f": {picture}\n" not in card.read_text():
        for program_file in card.parent.iterdir():  # of another picture
            if program_file.suffix in (".onnx", ".pt2", ".py"):
                program_file.unlink()
    for file_format in config.export.formats:
        data = portable.encode_model(
            traced, file_format, portable.input_name(program), facts, config.export.output
        )
        differences.append(portable.check_program(data, file_format, program, inputs))
        path = student / EXPORT_FOLDER / portable.file_name(file_format, config.export.output)
        file_at(path).write(data)
        files[file_format] = str(path)
    is_shown = "onnx" in files and config.export.output == "logits" and store.form.has_places
    if is_shown:
        file_at(card.with_name(PROGRAM)).write(Path(__file__).with_name(PROGRAM).read_bytes())
    if (export := provider_of(trained.config).export) is not None:
        export(student / EXPORT_FOLDER, network, trained)
    of_data = {name: facts[name] for name in ("labels", "bit_range")}
    if "thresholds" in facts:
        pairs = zip(facts["classes"], facts["thresholds"], strict=True)
        of_data["thresholds"] = ", ".join(f"{name} {value:.3f}" for name, value in pairs)
    of_data |= {
        f"{subject}: {name}": text
        for subject, sheet in read_sheets(student).items()
        if subject != "machine"
        for name, text in sheet.rows().items()
    }
    text = card_of_student(_facts(config, trained, kept) | of_data, PROGRAM if is_shown else None)
    file_at(card).write(text.encode())
    hub = "" if not config.to else upload_to_hub(student / EXPORT_FOLDER, config.to, "model")
    return ExportResult(
        files=files,
        largest_difference=max(differences),
        card=str(card),
        uploaded=hub,
        labels=f"many, predicted from {facts['thresholds']}" if "thresholds" in facts else "",
        next=f"{shlex.join(['python', str(card.with_name(PROGRAM)), files['onnx']])} FILE..."
        if is_shown
        else "",
    )


def _thresholds(config: ExportConfig, trained: TrainedModel) -> list[float]:
    """Return the probability from which each class is predicted, as an evaluation of the student has it."""
    run = RunFolder(config.run).path
    stored = stored_thresholds(run, "student", SavedNetwork(run / "distill").check())
    logits = [0.0] * trained.num_classes if stored is None else [pair[0] for pair in stored[1]]
    return [round(1 / (1 + math.exp(-logit)), 6) for logit in logits]


def _facts(
    config: ExportConfig, trained: TrainedModel, data_facts: StoredFacts | None
) -> dict[str, Any]:
    """Return what the card says of the student, with the facts next to its store."""
    folder = RunFolder(config.run).path
    shown = str(trained.picture or "")
    splits: dict[str, dict[str, Any]] = {}
    for results in map(read_results, [folder / "evaluate", *sorted(folder.glob("evaluate-on-*"))]):
        if results[PICTURE] == shown:
            splits = results["splits"] | splits

    def measured(name: str) -> str:
        values = {split: metrics[name] for split, metrics in splits.items() if name in metrics}
        return ", ".join(
            f"{split} {value:.1%}"
            + (
                f" ({data_facts.records[split]:,} records, split {data_facts.splits})"
                if data_facts is not None and data_facts.splits and split in data_facts.records
                else ""
            )
            for split, value in values.items()
        )

    return {
        "name": f"{trained.config.name}, distilled",
        "license": getattr(trained.config, "license", None),
        "is_timm": trained.config.kind == "timm",
        "network": f"{trained.config.kind} {trained.config.name}",
        "classes": len(trained.classes) or trained.num_classes,
        "input": shown or " x ".join(map(str, trained.input_size)),
        "teachers": ", ".join(trained.teachers),
        "accuracy": measured("accuracy"),
        "F1": measured("f1"),
        "made by": f"permafrost {__version__}",
    }
