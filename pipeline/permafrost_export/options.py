"""Verb `export`: its options, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

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
    input: Literal["images", "frames"] = "images"
    """Input of the programs. images: decoded images, which the program resizes. frames: frames of the network's size,
    which the caller resizes, for converters without antialiasing (TensorRT, CoreML, NPUs)."""
    input_size: Literal["free", "fixed"] = "free"
    """Size of the input. free: any number of images, each call of one size. fixed: one frame of the network's size, as
    devices need, so the caller resizes, as with export.input=frames."""
    opset: Annotated[int | None, Ge(1)] = None
    """Version of ONNX's operators in student.onnx, for older runtimes; null for the one that torch chooses. Below 18
    a program cannot resize, so set export.input=frames."""
    int8: bool = False
    """Also write student.int8.onnx: weights and activations in 8 bits, calibrated on frames of the student's training
    split; needs export.input_size=fixed."""

    def _check_together(self) -> None:
        require(len(self.formats) > 0, "export.formats is empty; name onnx, torch or both")
        require(
            not self.int8
            or (self.input_size, self.output, "onnx" in self.formats) == ("fixed", "logits", True),
            "export.int8=true quantizes student.onnx for frames of one size; set export.input_size=fixed, and leave "
            "export.formats with onnx and export.output=logits",
        )


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
        "run store.path export.formats export.output export.frame export.input export.input_size export.opset "
        "export.int8 to store.cache store.allow_links"
    ),
    takes_store_of_run=True,
    suggested_arguments=("run=",),
    typed_arguments=(),
    python="Write a student as programs that run without this project. The result has the `files` by format.",
)
