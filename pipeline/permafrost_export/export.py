"""Export a student as programs that run without this project: torch.export and ONNX, with all preprocessing.

    permafrost export experiment=demo run=my-student
    permafrost export run=photos export.formats=[torch]

Each program takes the pixels of decoded images and returns logits, or with export.output=pooled the features before the
classifier. It is run once, and must give the network's output up to 1e-4 of the largest one. On some files of the store
it is then compared with what an evaluation shows the student. For phones and browsers, export.input_size=fixed takes
one frame of the network's size, and export.int8=true quantizes it.

Reads   runs/<run>/distill/ and evaluate/, and the size of the frames of <store.path>
Writes  student.onnx (needs the extra `onnx`) and student.pt2, or embedding.onnx and embedding.pt2, and a card README.md
        and predict.py, which runs student.onnx, in runs/<run>/distill/export/, which to=hf://<user>/<name> uploads; a
        timm student is there in timm's form, too; student.int8.onnx with export.int8=true
Rerun   the programs are written again
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from permafrost.config.version import __version__
from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.results import PICTURE, read_results, stored_thresholds
from permafrost.models.saved import EXPORT_FOLDER, SavedNetwork, TrainedModel
from permafrost.runs.folder import SWEEP_NAME, PassRecords, RunFolder
from permafrost.storage.files import file_at, remove_old_partial_files
from permafrost.storage.rooted_paths import name_of_path
from permafrost.storage.signed_files import read_json
from permafrost.store.facts import StoredFacts, read_data_facts, read_sheets
from permafrost.store.reader import Store
from permafrost_export.card import card_of_student, in_words
from permafrost_export.hub import repository_of, require_hub, upload_to_hub
from permafrost_export.options import ExportConfig

PROGRAM = "predict.py"
"""Program that runs student.onnx on image files."""
_RESIZES = (
    "in the program, with antialiasing (ONNX: Resize of opset 18)",
    "before the program, as predict.py does: bilinear with antialiasing, width then height, each rounded to 8 bits",
)
_NOT_ON_FILES = "not compared: the store holds no original files (store.format=original) of images"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Files of the programs by format, and how far their outputs are from the network's."""

    files: dict[str, str]
    largest_difference: float
    """Largest difference of an output from the network's on noise of the network's size."""
    on_files: Mapping[str, Any] = field(default_factory=dict)
    """The program on original files (after) and the student on the store's frames (before): split, records, same_class,
    differences of logits, accuracies; empty if they were not compared."""
    int8: Mapping[str, Any] = field(default_factory=dict)
    """The program in 8 bits (after) and the float one (before) on frames, their megabytes and milliseconds an image;
    empty without export.int8=true."""
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
            "on_files": in_words(self.on_files) or _NOT_ON_FILES,
            **({"int8_values": in_words(self.int8)} if self.int8 else {}),
            "card": self.card,
            **({"uploaded": self.uploaded} if self.uploaded else {}),
            **({"labels": self.labels} if self.labels else {}),
            "next": self.next,
        }


def export_student(config: ExportConfig) -> ExportResult:
    """Trace the student, and write and check a program of each format."""
    with RunFolder(config.run).files.opened(f"distill/{EXPORT_FOLDER}"):
        _refuse_sweep(config.run)
        return _export(config)


def _refuse_sweep(run: str) -> None:
    """Raise ConfigError that lists the students of a sweep, those first that it has selected."""
    path = RunFolder(run).path / SWEEP_NAME
    if not path.exists() or SavedNetwork(path.parent / "distill").is_finished:
        return
    sweep = read_json(path, "delete it, and run the same permafrost sweep again")
    marks = {
        row["run"]: f" (selected by {sweep['select']})"
        for row in sweep.get("candidates", ())
        if row["chosen"]
    }
    names = dict.fromkeys([*marks, *(row["run"] for row in sweep["runs"])])
    raise ConfigError(
        f"run={run} is a sweep, and export takes one student; choose one of its {len(names)}: "
        + ", ".join(f"run={run}/{name}{marks.get(name, '')}" for name in names)
    )


def _export(config: ExportConfig) -> ExportResult:
    from permafrost.models.providers import provider_of
    from permafrost_export import portable, program_checks

    if config.to:
        require_hub()
        repository_of(config.to)
    student = RunFolder(config.run).path / "distill"
    store = PassRecords([student]).part_of(Store(config.store.folder))
    network, trained = SavedNetwork(student).load(store.manifest.classes)
    trained = trained.in_frame(config.export.frame, store)
    picture = str(trained.picture or "")
    if "onnx" in config.export.formats:
        portable.require_onnx()
    program = portable.program_of(network, trained.picture, config.export)
    inputs = portable.sample_inputs(program, store.size[1])
    is_fixed = config.export.input_size == "fixed"
    traced = portable.trace(program, inputs, is_fixed=is_fixed)
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
        "input": program.inputs.replace("[B", "[1") if is_fixed else program.inputs,
        "picture": picture,
        "made_by": f"permafrost {__version__}",
        "bit_range": next(iter(bit_range), "[0, 65535]"),
        "labels": "many" if store.manifest.multi_label else "one",
    } | ({"license": license_of_weights} if license_of_weights else {})
    if store.manifest.multi_label:
        facts["thresholds"] = _thresholds(config, trained)
    if isinstance(program, portable.ImageProgram):
        facts["resize"] = _RESIZES[program.takes_frames]
        if program.takes_frames:
            facts["resize_before"] = json.dumps(asdict(program.picture))
    files: dict[str, str] = {}
    differences, encoded = [], {}
    card = student / EXPORT_FOLDER / "README.md"
    name, output = portable.input_name(program), config.export.output
    for file_format in config.export.formats:
        data = portable.encode_model(traced, file_format, name, facts, output, config.export.opset)
        differences.append(
            portable.check_program(data, file_format, program, inputs, is_fixed=is_fixed)
        )
        files[file_format] = str(card.with_name(portable.file_name(file_format, output)))
        encoded[files[file_format]] = data
    on_files, int8 = {}, {}
    if output == "logits" and store.form.has_places:
        run = portable.open_program(data, file_format, name)
        on_files = program_checks.compare_on_files(run, network, store, trained, facts)
    if config.export.int8:
        both = {"float": encoded[files["onnx"]]}
        both["int8"] = program_checks.quantize(both["float"], name, store, trained)
        int8 = program_checks.compare_int8(both, name, store, trained, facts)
        files["int8"] = str(card.with_name("student.int8.onnx"))
        encoded[files["int8"]] = both["int8"]
    stem = portable.file_name("onnx", output).partition(".")[0]
    for earlier_file in card.parent.glob(f"{stem}.*"):  # which the new card does not describe
        earlier_file.unlink()
    remove_old_partial_files(card.parent, stem)
    for path, data in encoded.items():
        file_at(Path(path)).write(data)
    is_shown = "onnx" in files and config.export.output == "logits" and store.form.has_places
    if is_shown:
        file_at(card.with_name(PROGRAM)).write(Path(__file__).with_name(PROGRAM).read_bytes())
    if (export := provider_of(trained.config).export) is not None:
        export(student / EXPORT_FOLDER, network, trained)
    shown = ("input", "resize", "picture", "labels", "bit_range")
    of_data = {name: facts[name] for name in shown if name in facts}
    of_data["opset"] = portable.opset_in(encoded[files["onnx"]]) if "onnx" in files else ""
    of_data |= {"on files": in_words(on_files) or _NOT_ON_FILES, "int8": in_words(int8)}
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
        on_files=on_files,
        int8=int8,
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
    for place in (folder / "evaluate", *sorted(folder.glob("evaluate-on-*"))):
        results = read_results(place)
        origin = data_facts.splits if data_facts and place.name == "evaluate" else ""
        drawn = f", split {origin}" if origin else ""
        if results[PICTURE] == shown:
            splits = {
                split: metrics | {"how": f"{metrics['records']:,} records{drawn}"}
                for split, metrics in results["splits"].items()
            } | splits

    def measured(name: str) -> str:
        return ", ".join(
            f"{split} {metrics[name]:.1%} ({metrics['how']})"
            for split, metrics in splits.items()
            if name in metrics
        )

    return {
        "name": f"{trained.config.name}, distilled",
        "license": getattr(trained.config, "license", None),
        "is_timm": trained.config.kind == "timm",
        "network": f"{trained.config.kind} {trained.config.name}",
        "classes": len(trained.classes) or trained.num_classes,
        "teachers": ", ".join(trained.teachers),
        "accuracy": measured("accuracy"),
        "mean over classes": measured("mean_class_accuracy"),
        "F1": measured("f1"),
        "made by": f"permafrost {__version__}",
    }
