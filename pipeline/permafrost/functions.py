"""A function for each verb, which takes the arguments of its command line, and networks and datasets in memory.

Both make the same files:

    permafrost.distill("experiment=demo", run="mine", method="e2kd", tau=4)
    permafrost distill experiment=demo run=mine method=e2kd method.tau=4

An argument that is None is left to the experiment, or to the verb's default. Options without a parameter of their own
are keyword arguments, too, with a dot or two underscores: `trainer__precision="bf16"`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from permafrost.cli import run_typed_command
from permafrost.config.points import arguments_of_options, option_text
from permafrost.config.verbs import VERBS
from permafrost.core.errors import require
from permafrost.models.memory_network import digest_code, options_of_network, stateful
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.runs.folder import RunFolder
from permafrost.sources.memory_dataset import options_of_dataset, undecoded

if TYPE_CHECKING:
    from permafrost.evaluation.evaluate import EvaluateResult
    from permafrost.sources.data_preview import Preview
    from permafrost.training.distill import DistillResult
    from permafrost.training.teacher_training import TeachResult
    from permafrost.verbs.precompute import PrecomputeResult
    from permafrost.verbs.sweep import SweepResult

logger = logging.getLogger("permafrost.functions")

Place = str | os.PathLike[str]
"""Path of a file or folder, or the address of a bucket."""
Choice = str | Mapping[str, Any]
"""Member of a family: its kind, or a mapping with its kind and options, {"kind": "timm", "name": "resnet50"}."""


class MapStyle(Protocol):
    """Dataset whose records have numbers, or a mapping from splits to such datasets."""

    def __getitem__(self, index: Any, /) -> Any: ...


# ---- data and teachers -----------------------------------------------------------------------------


def preview(
    *arguments: str, data: Choice | None = None, dataset: MapStyle | None = None, **options: Any
) -> Preview:
    """Preview what is understood of data before anything is packed. The result has `classes`, `counts` and `findings`.

    Args:
        *arguments: Arguments of the command line.
        data: Source of the records, as in data="image_folder".
        dataset: Dataset in memory, as for `precompute`.
        **options: Other options of the command.

    Example:
        >>> preview(data="digits").counts.records["train"]
        1046
    """
    preview: Preview = _run("preview", locals()).preview
    return preview


def precompute(
    *arguments: str,
    teacher: nn.Module | Choice | None = None,
    dataset: MapStyle | None = None,
    store: Place | None = None,
    data: Choice | None = None,
    outputs: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layer: str | None = None,
    input_size: int | None = None,
    frame: Literal["auto", "center_crop", "full"] | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    name: str | None = None,
    executor: Literal["auto", "ray", "serial"] | None = None,
    **options: Any,
) -> PrecomputeResult:
    """Pack inputs into a store, and store the logits and explanations of a frozen teacher once.

    The same call computes only what is missing.

    Args:
        *arguments: Arguments of the command line.
        teacher: Network in eval mode from normalized images [B, 3, H, W] to logits [B, K], or one that options name.
            Its identity is the digest of its state and of the code of its classes.
        dataset: Map-style dataset of images or (image, label), with images of Pillow, or tensors [3, H, W], uint8 or in
            [0, 1]; torchvision's ImageFolder and its kind; a `datasets.Dataset`; a list of paths or (path, label); a
            DataFrame with a row per image file; or a mapping from splits to these.
        store: Folder of the store.
        data: Source of the records that options name, in place of `dataset`.
        outputs: What is stored of each record, such as ["logits", "maps"].
        mean: Mean of each channel in [0, 1], with which the teacher's images are normalized.
        std: Standard deviation of each channel in [0, 1].
        layer: Name of the module that is explained; None takes the last one whose output is a grid.
        input_size: Side in pixels of the teacher's images; None takes that of the stored frames.
        frame: Part of a photograph that the teacher receives. "full", the default: all of it, squeezed to a square;
            "center_crop": a square in the middle, in the photograph's proportions.
        image_size: Side in pixels of the stored frames; None takes the images' common size, or 256 for files that have
            none.
        batch_size: Number of records of a forward pass.
        name: Name of the pass.
        executor: Executor of the work.
        **options: Other options of the command.

    Returns:
        The folder `store`, the names of the `passes`, and the `teacher_accuracy` by split.

    Raises:
        UserError: If the teacher, the dataset or an option cannot be used.
    """
    result: PrecomputeResult = _run("precompute", locals(), frozen=("teacher",))
    return result


def teach(
    *arguments: str,
    teacher: nn.Module | Choice | None = None,
    store: Place | None = None,
    run: Place | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: Choice | None = None,
    splits: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **options: Any,
) -> TeachResult:
    """Train a teacher on a store's labels.

    Args:
        *arguments: Arguments of the command line.
        teacher: Network to train, which gets the trained weights, or one that options name.
        store: Folder of the store.
        run: Name of the run; None keeps nothing of the training of a network in memory.
        epochs: Number of epochs.
        batch_size: Number of records of a step.
        lr: Learning rate at the beginning.
        augment: Random views, such as "pad_crop_flip".
        splits: Splits on which the accuracy is measured.
        mean: Mean of each channel, as for `precompute`.
        std: Standard deviation of each channel.
        seed: Seed of all draws.
        **options: Other options of the command.

    Returns:
        The file of its `weights`, empty without a run, and its `accuracy` by split.
    """
    result: TeachResult = _run("teach", locals(), trained="teacher")
    return result if run else replace(result, weights="", next="")


# ---- students --------------------------------------------------------------------------------------


def distill(
    *arguments: str,
    student: nn.Module | Choice | None = None,
    store: Place | None = None,
    run: Place | None = None,
    teacher: str | nn.Module | Mapping[str, Any] | None = None,
    method: Choice | None = None,
    tau: float | None = None,
    augment: Choice | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    split: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
    **options: Any,
) -> DistillResult:
    """Train one student from a store.

    Args:
        *arguments: Arguments of the command line.
        student: Network to train, which gets the trained weights, or one that options name.
        store: Folder of the store.
        run: Name of the run; None keeps nothing of the training of a network in memory.
        teacher: Name of the teacher pass; None takes the only one. With mode="live" the network that is run.
        method: Loss, such as "kd" (`permafrost.list_methods`).
        tau: Temperature of the soft targets.
        augment: Random views, such as "pad_crop_flip".
        epochs: Number of epochs.
        batch_size: Number of records of a step.
        lr: Learning rate at the beginning.
        split: Split to train on.
        mean: Mean of each channel in [0, 1], with which the images of a network in memory are normalized.
        std: Standard deviation of each channel.
        seed: Seed of all draws.
        **options: Other options of the command.

    Returns:
        The folder `student`, empty without a run, and the network `model`: that of `student` if it is in memory.
    """
    parameters = locals()
    if isinstance(teacher, str) and options.get("mode") != "live":
        parameters |= {"teacher": None, "store.teacher": [teacher]}
    if isinstance(teacher, nn.Module):
        parameters |= {"teacher.mean": mean, "teacher.std": std}
    result: DistillResult = _run("distill", parameters, trained="student", frozen=("teacher",))
    if not isinstance(student, nn.Module):
        return result
    named = result if run else replace(result, student="", next="")
    return replace(named, network=student)


def evaluate(
    *arguments: str,
    student: nn.Module | Choice | None = None,
    store: Place | None = None,
    run: Place | None = None,
    splits: Sequence[str] | None = None,
    evaluators: Sequence[str] | None = None,
    model: Literal["student", "teacher", "network"] | None = None,
    teacher: nn.Module | Choice | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layer: str | None = None,
    **options: Any,
) -> EvaluateResult:
    """Evaluate a finished student, its teacher or a network.

    Args:
        *arguments: Arguments of the command line.
        student: Network to evaluate, as it is in memory, or one that options name; None is the student of the run.
        store: Folder of the store.
        run: Name of the run; None keeps nothing of the evaluation of a network in memory.
        splits: Splits to evaluate.
        evaluators: What is measured (`permafrost.list_evaluators`).
        model: Network that is evaluated, where none is in memory.
        teacher: Network of the teacher, for evaluators that run it again.
        mean: Mean of each channel in [0, 1], with which the images of a network in memory are normalized.
        std: Standard deviation of each channel.
        layer: Name of the module that is explained; None takes the last one whose output is a grid.
        **options: Other options of the command.

    Returns:
        The metrics by split, `splits`, and the file `metrics`, empty without a run.
    """
    parameters = locals()
    if (
        isinstance(student, nn.Module)
        and run is not None
        and _is_as_trained(student, run, mean, std)
    ):
        parameters |= dict.fromkeys(("student", "mean", "std", "layer"))
    elif isinstance(student, nn.Module):
        parameters |= {"model": "network", "run": None}
    result: EvaluateResult = _run("evaluate", parameters, trained="student", frozen=("teacher",))
    is_kept = parameters["run"] is not None or not isinstance(parameters["student"], nn.Module)
    return result if is_kept else replace(result, metrics="", next="")


def sweep(
    *arguments: str,
    store: Place | None = None,
    run: Place | None = None,
    student: Choice | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    select: str | None = None,
    epochs: int | None = None,
    evaluators: Sequence[str] | None = None,
    executor: Literal["auto", "ray", "serial"] | None = None,
    parallel: int | None = None,
    **options: Any,
) -> SweepResult:
    """Train and evaluate the students of a sweep: variants, a grid of options, and seeds.

    Args:
        *arguments: Arguments of the command line.
        store: Folder of the store.
        run: Name of the run.
        student: Network of all students.
        variants: Arguments of `distill` by the name of the variant.
        grid: Values by option of `distill`.
        seeds: Seeds, each of which trains every variant once.
        select: Metric that selects the grid point of each variant, such as "holdout.accuracy".
        epochs: Number of epochs.
        evaluators: What is measured of each student.
        executor: Executor of the work.
        parallel: Largest number of students that are trained at once.
        **options: Other options of the command.
    """
    result: SweepResult = _run("sweep", locals())
    return result


def run_verb(verb: str, *arguments: str, **options: Any) -> Any:
    """Run a verb in this process, and return its result.

    Args:
        verb: Name of the verb.
        *arguments: Arguments of the command line, as text.
        **options: Options as keyword arguments (`permafrost.config.points.arguments_of_options`).

    Raises:
        UserError: Where the command would end with an error.
    """
    return run_typed_command(verb, arguments_of_options(verb, arguments, options))


def verb_function(verb: str) -> Callable[..., Any]:
    """Return the function of a verb that a package adds, `permafrost.<verb>`, with the docstring that it states."""

    def function(*arguments: str, **options: Any) -> Any:
        return run_verb(verb, *arguments, **options)

    function.__name__ = function.__qualname__ = verb
    function.__doc__ = VERBS[verb].python or VERBS[verb].help.partition("\n")[0]
    return function


# ---- calls -----------------------------------------------------------------------------------------

_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "preview": {},
    "precompute": {
        **{name: f"teacher.{name}" for name in ("mean", "std", "layer", "input_size", "frame")},
        **{"outputs": "annotate.outputs", "batch_size": "annotate.batch_size"},
        **{"name": "annotate.name", "image_size": "store.image_size"},
    },
    "teach": {
        **{name: f"teacher.{name}" for name in ("mean", "std")},
        **{name: f"teaching.trainer.{name}" for name in ("epochs", "batch_size")},
        **{"lr": "teaching.optimizer.lr", "augment": "teaching.augment"},
        **{"splits": "evaluate.splits"},
    },
    "distill": {
        **{name: f"student.{name}" for name in ("mean", "std")},
        **{name: f"trainer.{name}" for name in ("epochs", "batch_size")},
        **{"lr": "optimizer.lr", "tau": "method.tau"},
    },
    "evaluate": {
        **{name: f"student.{name}" for name in ("mean", "std", "layer")},
        **{"splits": "evaluate.splits"},
    },
    "sweep": {"epochs": "trainer.epochs"},
}
"""Options that the parameters of a verb's function set, where they have other names."""


def _run(
    verb: str, parameters: Mapping[str, Any], *, trained: str = "", frozen: Sequence[str] = ()
) -> Any:
    """Run a verb with the parameters of its function, and return its result.

    Args:
        verb: Name of the verb.
        parameters: Values of the parameters by name.
        trained: Parameter of the network that gets the weights of the run, which is removed if none is named.
        frozen: Parameters of networks that are not trained.
    """
    values = {name: value for name, value in parameters.items() if value is not None}
    arguments, more = values.pop("arguments"), values.pop("options")
    network, dataset = parameters.get(trained), values.pop("dataset", None)
    objects: dict[str, dict[str, Any]] = {}
    for section in {trained, *frozen} & values.keys():
        if isinstance(values[section], nn.Module):
            objects[section] = {"network": values[section]}
            side = parameters.get("input_size")
            values[section] = options_of_network(values[section], section, section in frozen, side)
            if section == trained and verb != "evaluate":
                del values[section]["classes"]  # as many as its targets have
                require(
                    any(tensor.requires_grad for tensor in parameters[section].parameters()),
                    f"{section}= has no parameter that requires a gradient, so nothing of it would be trained; call "
                    f"{section}.requires_grad_()",
                )
        require(
            isinstance(values[section], (str, Mapping)),
            f"{section}={values[section]!r} is {type(values[section]).__name__} instead of a torch.nn.Module, the name "
            'of a kind, or a mapping such as {"kind": "timm", "name": "resnet50"}',
        )
    with ExitStack() as stack:
        if dataset is not None:
            require("data" not in values, "dataset= and data= both name the records; leave one out")
            folder = stack.enter_context(TemporaryDirectory(prefix="permafrost-"))
            values["data"] = options_of_dataset(dataset, Path(folder), values)
            if values["data"]["kind"] == "memory":
                objects["data"] = {"dataset": undecoded(dataset)}
        if isinstance(network, nn.Module):
            is_named = "run" in values
            if not is_named:
                values["run"] = stack.enter_context(TemporaryDirectory(prefix="permafrost-"))
            saved = SavedNetwork(RunFolder(os.fspath(values["run"])).path / verb)
            saved.build_from(network)
            if not is_named:
                stack.callback(saved.forget)
        options = {_OPTIONS[verb].get(name, name): value for name, value in values.items()}
        words = arguments_of_options(verb, arguments, options | more)
        result = run_typed_command(verb, words, objects)
        if isinstance(network, nn.Module) and saved.is_finished:
            stateful(network).load_state_dict(load_file(saved.folder / MODEL_NAME))
    return result


def _is_as_trained(network: nn.Module, run: Place, mean: object, std: object) -> bool:
    """Return whether a network has the weights, code and normalization of a run's student; log if it does not."""
    student = SavedNetwork(RunFolder(os.fspath(run)).path / "distill")
    is_same = False
    if student.is_finished:
        student.build_from(network)
        saved, state = load_file(student.folder / MODEL_NAME), stateful(network).state_dict()
        config = student.describe().config
        is_same = (
            getattr(config, "code", None) == digest_code(network)
            and (mean is None or option_text(mean) == option_text(config.mean))
            and (std is None or option_text(std) == option_text(config.std))
            and saved.keys() == state.keys()
            and all(torch.equal(saved[name], tensor.cpu()) for name, tensor in state.items())
        )
    if not is_same:
        logger.warning(
            "the network is not the student of run=%s, or its weights, code or normalization were changed since: it is "
            "evaluated as it is, and the results are not kept",
            run,
        )
    return is_same
