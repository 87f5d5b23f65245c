"""Programs of a trained network that run without this project: torch.export and ONNX, with all preprocessing.

The program takes decoded pixels of any size and repeats what an evaluation does: the store's frame, or the original
image, the part of it in the network's picture, and the network's own normalization. A program of frames leaves the
resize to its caller.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.environment import report_nothing
from permafrost.config.models import Picture
from permafrost.core.errors import ConfigError, UserError, first_line, require
from permafrost.models.classifier import Classifier, Intermediates, trial_copy
from permafrost.models.record_independence import PROBED_RECORDS, require_independent_records
from permafrost_export.options import ExportOptions

Format = Literal["onnx", "torch"]
ProgramOutput = Literal["logits", "pooled"]
_ENDINGS: Mapping[Format, str] = {"onnx": "onnx", "torch": "pt2"}
TOLERANCE = 1e-4
"""Largest difference of a program's output from the network's, relative to the largest value if that is above 1."""
_MAX_SIDE = 16384
"""Pixels of the longest side that a program takes."""
RESIZE_OPSET = 18
"""First version of ONNX's operators that resizes with antialiasing, and the first one that torch writes."""


class WrongProgramError(UserError):
    """Error for a program whose output differs from the network's."""


def file_name(file_format: Format, output: ProgramOutput) -> str:
    """Return the name of a program's file."""
    return f"{'student' if output == 'logits' else 'embedding'}.{_ENDINGS[file_format]}"


class _Program(nn.Module):
    """A network and the output that a program returns."""

    inputs: str
    """Type and shape of the inputs, as text."""

    def __init__(self, network: Classifier, output: ProgramOutput = "logits") -> None:
        super().__init__()
        self.network = network
        self.output: ProgramOutput = output

    def run(self, inputs: Tensor) -> Tensor:
        """Return the output for the network's inputs: logits f32 [B, K], or pooled features f32 [B, d]."""
        if self.output == "logits":
            return self.network(inputs).logits
        return self.network(inputs, Intermediates(pooled=True)).require("pooled")


class ImageProgram(_Program):
    """Program from images u8 [B, 3, H, W] of one size to logits f32 [B, K], or pooled features f32 [B, d].

    Args:
        network: The network.
        picture: What it receives of an image.
        output: Output of the program.
        takes_frames: Whether images have the network's size already, so that the program holds no resize.
    """

    inputs = "decoded RGB images u8 [B, 3, H, W]"

    def __init__(
        self,
        network: Classifier,
        picture: Picture,
        output: ProgramOutput = "logits",
        *,
        takes_frames: bool = False,
    ) -> None:
        super().__init__(network, output)
        self.picture, self.takes_frames = picture, takes_frames
        if takes_frames:
            self.inputs = f"RGB frames u8 [B, 3, {picture.size[0]}, {picture.size[1]}]"

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of an evaluation of the images."""
        if self.takes_frames:
            return self.run(images / 255)
        height, width = images.shape[-2:]
        crop, size, frames = self.picture.crop, self.picture.size, self.picture.frames
        if frames is None:
            if crop is not None:  # in whole pixels, as loading.windows.views_of_picture
                side = torch.sym_int(crop * torch.sym_min(height, width) + 0.5)
                top, left = (height - side) // 2, (width - side) // 2
                images = images[:, :, top : top + side, left : left + side]
            return self.run(_resize(images, size) / 255)
        pixels = _resize(images, frames)
        if crop is not None or frames != size:
            pixels = self._sample(pixels, height, width)
        return self.run(pixels / 255)

    def _sample(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """Sample the evaluated part of the canonical frame, as loading.geometry.warp does inside the frame."""
        rows, columns = self.picture.size
        down = (2 * torch.arange(rows) + 1) / rows - 1
        across = (2 * torch.arange(columns) + 1) / columns - 1
        if self.picture.crop is not None:
            side = self.picture.crop * cast("int", torch.sym_min(height, width))
            down, across = down * (side / height), across * (side / width)
        grid = torch.stack([across.expand(rows, -1), down[:, None].expand(-1, columns)], dim=-1)
        grid = grid.expand(pixels.shape[0], -1, -1, -1)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images as torch's kernel for bytes does (store.record_form.resize_pixels), up to a level of a few pixels.

    It resizes rows, then columns, and rounds halves up after each. Its weights have 16 bits, so a sum that is a little
    less than a half is one there.
    """
    pixels = images.float()
    for shape in ([images.shape[-2], size[1]], list(size)):
        pixels = F.interpolate(pixels, shape, mode="bilinear", antialias=True)
        pixels = (pixels + 0.501).floor().clamp(0, 255)
    return pixels


class RowProgram(_Program):
    """Program from rows f32 [B, d], as they are stored, to logits f32 [B, K]."""

    inputs = "rows f32 [B, d]"

    def forward(self, rows: Tensor) -> Tensor:
        """Return the output."""
        return self.run(rows)


def program_of(
    network: Classifier, picture: Picture | None, options: ExportOptions
) -> ImageProgram | RowProgram:
    """Return the program of a network that options ask for.

    Args:
        network: The network.
        picture: What it receives of an image; None if it takes rows.
        options: Options of the export.

    Raises:
        ConfigError: If rows are to be frames, or the opset cannot hold the program's resize.
    """
    if picture is None:
        require(
            options.input == "images" and not options.int8,
            "export.input=frames and export.int8=true are for images, and this student takes rows of a table; leave "
            "them out",
        )
        return RowProgram(network, options.output)
    takes_frames = options.input == "frames" or options.input_size == "fixed"
    require(
        takes_frames or options.opset is None or options.opset >= RESIZE_OPSET,
        f"export.opset={options.opset} cannot resize with antialiasing, which needs {RESIZE_OPSET}; set "
        "export.input=frames, and resize before the program, as its predict.py does",
    )
    return ImageProgram(network, picture, options.output, takes_frames=takes_frames)


def input_name(program: nn.Module) -> str:
    """Return the name of a program's only input."""
    return "rows" if isinstance(program, RowProgram) else "images"


def sample_inputs(program: nn.Module, columns: int) -> Tensor:
    """Return inputs to trace and check a program: frames of noise, or rows of `columns` numbers."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(program, RowProgram):
        return torch.randn(PROBED_RECORDS + 1, columns, generator=generator)
    picture = cast("ImageProgram", program).picture
    # Of whole pixels, so that no rounding differs.
    whole = picture.frames or tuple(round(side / (picture.crop or 1)) for side in picture.size)
    size = picture.size if cast("ImageProgram", program).takes_frames else whole
    return torch.randint(
        0, 256, (PROBED_RECORDS + 1, 3, *size), generator=generator, dtype=torch.uint8
    )


def trace(
    program: nn.Module, inputs: Tensor, *, is_fixed: bool = False
) -> torch.export.ExportedProgram:
    """Trace a program with torch.export, for any number of inputs and any size of images.

    Args:
        program: Program, which is put into eval mode.
        inputs: Inputs of `sample_inputs`.
        is_fixed: Whether it takes one input instead of any number.

    Raises:
        ConfigError: If the network cannot be traced.
        DependentRecordsError: If its output of a record depends on other records.
    """
    dim = torch.export.Dim
    sizes: dict[int, Any] = {0: dim("batch", min=1)}
    if isinstance(program, ImageProgram) and not program.takes_frames:
        sizes |= {
            2: dim("height", min=1, max=_MAX_SIDE),
            3: dim("width", min=1, max=_MAX_SIDE),
        }
    with torch.no_grad():
        # A network of one's own is examined in its first pass, which is not traced.
        trial = trial_copy(program.eval())
        require_independent_records(
            "the student",
            trial,
            lambda records: [trial(records)],
            inputs[:PROBED_RECORDS],
            inputs[-1:],
        )
        program(inputs)
    try:
        with torch.no_grad():
            traced = (
                torch.export.export(program, (inputs[:1],))
                if is_fixed
                else torch.export.export(program, (inputs,), dynamic_shapes=(sizes,))
            )
    except Exception as error:  # torch.export raises many types of exceptions
        raise ConfigError(
            f"torch.export cannot trace this network ({first_line(error)}); a network of your own must not branch on "
            "the values of tensors"
        ) from error
    for module in traced.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # names files of this machine
    return traced


def encode_model(
    traced: torch.export.ExportedProgram,
    file_format: Format,
    name: str,
    facts: Mapping[str, Any],
    output: ProgramOutput = "logits",
    opset: int | None = None,
) -> bytes:
    """Return a traced program as a file of a format.

    Args:
        traced: Program of `trace`.
        file_format: Format of the file.
        name: Name of the input.
        facts: Values that a reader of the file needs, written as JSON: metadata of ONNX, extra files of torch.export.
        output: Name of the output.
        opset: Version of ONNX's operators; None for torch's choice.

    Raises:
        ConfigError: If the packages for ONNX are missing, or the network cannot be converted.
    """
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()
    }
    if file_format == "torch":
        data = io.BytesIO()
        torch.export.save(traced, data, extra_files=dict(texts))
        return data.getvalue()
    require_onnx()
    import onnx

    for library in ("onnx_ir", "onnxscript"):  # which log each pass of their optimizers
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        program = torch.onnx.export(
            *(traced,),
            input_names=[name],
            output_names=[output],
            opset_version=None if opset is None else max(opset, RESIZE_OPSET),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch.onnx raises many types of exceptions
        raise ConfigError(
            f"torch.onnx cannot convert this network ({first_line(error)}); set export.formats=[torch]"
        ) from error
    assert program is not None
    model = _in_opset(program.model_proto, opset)
    texts["opset"] = str(_opset_of(model))
    onnx.helper.set_model_props(model, texts)
    encoded: bytes = model.SerializeToString()
    return encoded


def opset_in(data: bytes) -> int:
    """Return the version of ONNX's operators in a file."""
    import onnx

    return _opset_of(onnx.ModelProto.FromString(data))


def _opset_of(model: Any) -> int:
    return max(int(each.version) for each in model.opset_import if not each.domain)


def _in_opset(model: Any, opset: int | None) -> Any:
    """Return a model in an earlier opset than torch writes, and of the oldest format that has it.

    Raises:
        ConfigError: If the opset lacks operators of the network.
    """
    import onnx

    try:
        if opset is not None and opset < _opset_of(model):
            constants = {each.name: each for each in model.graph.initializer}
            for node in model.graph.node:  # all else keeps its form, or the checker refuses it
                if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
                    axes = onnx.numpy_helper.to_array(constants[node.input.pop()]).tolist()
                    kept = [each for each in node.attribute if each.name == "keepdims"]
                    del node.attribute[:]
                    node.attribute.extend([*kept, onnx.helper.make_attribute("axes", axes)])
            (entry,) = (each for each in model.opset_import if not each.domain)
            entry.version = opset
        oldest = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
        model.ir_version = min(model.ir_version, oldest)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker raises several types
        raise ConfigError(
            f"export.opset={opset} cannot hold this network ({first_line(error)[:120]}); choose a later one"
        ) from error
    require(
        opset in (None, _opset_of(model)),
        f"export.opset={opset} is not written by torch {torch.__version__}, which gives {_opset_of(model)}; choose an "
        "earlier one",
    )
    return model


def open_program(
    data: bytes, file_format: Format, name: str, threads: int = 0
) -> Callable[[Tensor], Tensor]:
    """Return the function from inputs to the output that a file's program computes.

    Args:
        data: Content of the file.
        file_format: Format of the file.
        name: Name of the input.
        threads: Number of threads of ONNX; 0 for one on each core.
    """
    if file_format == "torch":
        return torch.export.load(io.BytesIO(data)).module()
    report_nothing()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of operations and dtypes that it does not have
        raise ConfigError(
            f"onnxruntime cannot open the program of this network ({first_line(error)[:200]}); set "
            "export.formats=[torch], or take autocast out of the network"
        ) from error
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


def check_program(
    data: bytes, file_format: Format, program: nn.Module, inputs: Tensor, *, is_fixed: bool = False
) -> float:
    """Return the largest difference between the outputs of a file and of the program that it was made from.

    Both run on all inputs, in another order, and on one; a fixed program on each of them.

    Args:
        data: Content of the file.
        file_format: Format of the file.
        program: Program that was traced.
        inputs: Inputs of `sample_inputs`.
        is_fixed: Whether the file's program takes one input.

    Raises:
        WrongProgramError: If the difference is above TOLERANCE.
    """
    with torch.no_grad():
        batches = torch.split(inputs, 1) if is_fixed else (inputs, inputs.flip(0), inputs[:1])
        expected: Tensor = torch.cat([program(batch) for batch in batches])
        run = open_program(data, file_format, input_name(program))
        actual = torch.cat([run(batch) for batch in batches])
    difference = float((actual - expected).abs().max())
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    require(
        difference <= limit,
        f"the output of the {file_format} program differs by {difference:.2g} from the network's (at most "
        f"{limit:.2g} is rounding), so it was not written; choose another of export.formats",
        WrongProgramError,
    )
    return difference


def require_onnx() -> None:
    """Raise ConfigError without the packages that write and run ONNX."""
    report_nothing()
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"export.formats=[onnx] needs the package {error.name}; pip install onnx onnxscript onnxruntime, or choose "
            "export.formats=[torch]"
        ) from error
    onnxruntime.set_default_logger_severity(3)
