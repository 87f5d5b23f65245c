"""Verb `export`: its options, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from permafrost.config.evaluation import Frame
from permafrost.config.options import Options
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import VERBS, Verb
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Programs that `export` writes."""

    section: ClassVar[str] = "export"

    formats: tuple[Literal["onnx", "torch"], ...] = ("onnx", "torch")
    """Formats of the programs. onnx: student.onnx, for ONNX runtimes. torch: student.pt2, for torch.export.load."""
    output: Literal["logits", "pooled"] = "logits"
    """Output of the programs. pooled: the features before the classifier, in embedding.onnx and embedding.pt2, for
    students of embeddings."""
    frame: Frame = "auto"
    """Part of an image that the student receives, as evaluate.frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.formats) > 0, "export.formats is empty; name onnx, torch or both")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """Sections that `export` reads; the student is the one of `run`."""

    store: StoreOptions
    export: ExportOptions
    to: str = ""
    """hf://<user>/<name>, a repository of the Hugging Face hub that gets the folder with its card (needs
    huggingface_hub and student.license); empty uploads nothing."""
    run: str = ""
    """Folder below runs/ of the student to export."""


VERBS["export"] = Verb(
    options=ExportConfig,
    function="permafrost_export.export:export_student",
    order=65,
    group="student",
    common=(
        "run store.path export.formats export.output export.frame to store.cache store.allow_links"
    ),
    takes_store_of_run=True,
    python="Write a student as programs that run without this project. The result has the `files` by format.",
)
