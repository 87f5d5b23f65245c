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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from permafrost.cli import run_typed_command
from permafrost.config.points import arguments_of_options
from permafrost.config.verbs import VERBS
from permafrost.core.errors import require
from permafrost.models.memory_network import options_of_network, stateful
from permafrost.models.saved import SavedNetwork
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.runs.folder import RunFolder
from permafrost.sources.memory_dataset import undecoded, write_table

if TYPE_CHECKING:
    from permafrost.evaluation.evaluate import EvaluateResult
    from permafrost.sources.data_preview import Preview
    from permafrost.training.distill import DistillResult
    from permafrost.training.teach import TeachResult
    from permafrost.verbs.precompute import PrecomputeResult
    from permafrost.verbs.sweep import SweepResult

logger = logging.getLogger("permafrost.functions")

Place = str | os.PathLike[str]
"""Path of a file or folder, or the address of a bucket."""
Member = str | Mapping[str, Any]
"""Member of a family: its kind, or a mapping with its kind and options, {"kind": "timm", "name": "resnet50"}."""


class MapStyle(Protocol):
    """Dataset whose records have numbers, or a mapping from splits to such datasets."""

    def __getitem__(self, index: Any, /) -> Any: ...


# ---- data and teachers -----------------------------------------------------------------------------


def preview(
    *arguments: str, data: Member | None = None, dataset: MapStyle | None = None, **options: Any
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
    with _Call("preview", arguments, options) as call:
        call.set(data=data)
        call.set_dataset(dataset)
        result: Preview = call.run().preview
    return result


def precompute(
    *arguments: str,
    teacher: nn.Module | Member | None = None,
    dataset: MapStyle | None = None,
    store: Place | None = None,
    data: Member | None = None,
    outputs: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layer: str | None = None,
    input_size: int | None = None,
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
        image_size: Side in pixels of the stored frames; None takes the images' common size.
        batch_size: Number of records of a forward pass.
        name: Name of the pass.
        executor: Executor of the work.
        **options: Other options of the command.

    Returns:
        The folder `store`, the names of the `passes`, and the `teacher_accuracy` by split.

    Raises:
        UserError: If the teacher, the dataset or an option cannot be used.
    """
    with _Call("precompute", arguments, options) as call:
        call.set(store=store, data=data, executor=executor)
        options_of_input = {"mean": mean, "std": std, "layer": layer, "input_size": input_size}
        call.set_network("teacher", teacher, is_frozen=True, **options_of_input)
        call.set_dataset(dataset, is_sized=image_size is not None)
        call.set("annotate", payloads=outputs, batch_size=batch_size, name=name)
        call.set("store", image_size=image_size)
        result: PrecomputeResult = call.run()
    return result


def teach(
    *arguments: str,
    teacher: nn.Module | Member | None = None,
    store: Place | None = None,
    run: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: Member | None = None,
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
    with _Call("teach", arguments, options) as call:
        call.set(store=store, seed=seed)
        call.set_network("teacher", teacher, mean=mean, std=std)
        call.set("teaching", augment=augment)
        call.set("teaching.trainer", epochs=epochs, batch_size=batch_size)
        call.set("teaching.optimizer", lr=lr)
        call.set("evaluate", splits=splits)
        with _run_of(call, run, teacher):
            result: TeachResult = call.run()
            if isinstance(teacher, nn.Module):
                _take_weights(teacher, Path(result.weights).parent)
                result = replace(result, weights=result.weights if run else "")
    return result


# ---- students --------------------------------------------------------------------------------------


def distill(
    *arguments: str,
    student: nn.Module | Member | None = None,
    store: Place | None = None,
    run: str | None = None,
    teacher: str | nn.Module | Mapping[str, Any] | None = None,
    method: Member | None = None,
    tau: float | None = None,
    augment: Member | None = None,
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
    with _Call("distill", arguments, options) as call:
        call.set(store=store, method=method, augment=augment, split=split, seed=seed)
        call.set_network("student", student, mean=mean, std=std)
        if isinstance(teacher, str) and options.get("mode") != "live":
            call.set("store", teacher=[teacher])
        else:
            call.set_network("teacher", teacher, is_frozen=True)
        call.set("method", tau=tau)
        call.set("trainer", epochs=epochs, batch_size=batch_size)
        call.set("optimizer", lr=lr)
        with _run_of(call, run, student):
            result: DistillResult = call.run()
            if isinstance(student, nn.Module):
                _take_weights(student, Path(result.student))
                result = replace(result, network=student, student=result.student if run else "")
    return result


def evaluate(
    *arguments: str,
    student: nn.Module | Member | None = None,
    store: Place | None = None,
    run: str | None = None,
    splits: Sequence[str] | None = None,
    evaluators: Sequence[str] | None = None,
    model: Literal["student", "teacher", "network"] | None = None,
    teacher: nn.Module | Member | None = None,
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
    with _Call("evaluate", arguments, options) as call:
        call.set(store=store, evaluators=evaluators, model=model)
        call.set("evaluate", splits=splits)
        call.set_network("teacher", teacher, is_frozen=True)
        if isinstance(student, nn.Module) and run is not None and _is_as_trained(student, run):
            student = None
        elif student is not None:
            run = None if isinstance(student, nn.Module) else run
            call.set(model="network")
            call.set_network("student", student, mean=mean, std=std, layer=layer)
        with _run_of(call, run, student):
            result: EvaluateResult = call.run()
            if isinstance(student, nn.Module):
                result = replace(result, metrics="")
    return result


def sweep(
    *arguments: str,
    store: Place | None = None,
    run: str | None = None,
    student: Member | None = None,
    arms: Mapping[str, Sequence[str]] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    select: str | None = None,
    epochs: int | None = None,
    evaluators: Sequence[str] | None = None,
    executor: Literal["auto", "ray", "serial"] | None = None,
    parallel: int | None = None,
    **options: Any,
) -> SweepResult:
    """Train and evaluate the students of a sweep: arms, a grid of options, and seeds.

    Args:
        *arguments: Arguments of the command line.
        store: Folder of the store.
        run: Name of the run.
        student: Network of all students.
        arms: Arguments of `distill` by the name of the arm.
        grid: Values by option of `distill`.
        seeds: Seeds, each of which trains every arm once.
        select: Metric that selects the point of each arm, such as "holdout.accuracy".
        epochs: Number of epochs.
        evaluators: What is measured of each student.
        executor: Executor of the work.
        parallel: Largest number of students that are trained at once.
        **options: Other options of the command.
    """
    with _Call("sweep", arguments, options) as call:
        call.set(store=store, run=run, student=student, arms=arms, grid=grid, seeds=seeds)
        call.set(select=select, evaluators=evaluators, executor=executor, parallel=parallel)
        call.set("trainer", epochs=epochs)
        result: SweepResult = call.run()
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


class _Call:
    """Call of a verb: its options by name, and the objects that no option can name."""

    def __init__(self, verb: str, arguments: Sequence[str], options: Mapping[str, Any]) -> None:
        """Begin with the arguments and options that the caller has written as those of the command."""
        self.verb, self._arguments, self._more = verb, arguments, options
        self._options: dict[str, Any] = {}
        self._objects: dict[str, dict[str, Any]] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *error: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def set(self, section: str = "", /, **values: Any) -> None:
        """Set options of a section, empty for the top level, that are not None."""
        prefix = f"{section}." if section else ""
        self._options |= {
            f"{prefix}{name}": value for name, value in values.items() if value is not None
        }

    def set_network(
        self,
        section: str,
        network: nn.Module | Member | None,
        *,
        is_frozen: bool = False,
        **values: Any,
    ) -> None:
        """Set the network of a section, and options of it; one that is not trained is in eval mode."""
        if isinstance(network, nn.Module):
            self._options[section] = options_of_network(
                network, section, is_frozen=is_frozen, side=values.get("input_size")
            )
            self._objects[section] = {"network": network}
        elif network is not None:
            require(
                isinstance(network, (str, Mapping)),
                f"{section}={network!r} is {type(network).__name__} instead of a torch.nn.Module, the name of a kind, "
                'or a mapping such as {"kind": "timm", "name": "resnet50"}',
            )
            self._options[section] = network
        self.set(section, **values)

    def set_dataset(self, dataset: MapStyle | None, *, is_sized: bool = False) -> None:
        """Set the data to a dataset in memory: a table of its files, or the dataset itself."""
        if dataset is None:
            return
        require(
            "data" not in self._options, "dataset= and data= both name the records; leave one out"
        )
        self._folder = TemporaryDirectory(prefix="permafrost-")
        table = write_table(dataset, Path(self._folder.name))
        if table is None:
            table = {"kind": "memory", "sizes": "any" if is_sized else "equal"}
            teacher = self._options.get("teacher")
            if isinstance(teacher, dict) and "classes" in teacher:
                table["classes"] = teacher["classes"]
            self._objects["data"] = {"dataset": undecoded(dataset)}
        self._options["data"] = table

    def run(self) -> Any:
        """Run the verb, and return its result."""
        arguments = arguments_of_options(
            self.verb, self._arguments, self._options | dict(self._more)
        )
        return run_typed_command(self.verb, arguments, self._objects)


@contextmanager
def _run_of(call: _Call, run: str | None, network: object) -> Iterator[None]:
    """Set the run of a verb, one for the block alone where its network is in memory and no run is named."""
    if not isinstance(network, nn.Module):
        call.set(run=run)
        yield
        return
    with TemporaryDirectory(prefix="permafrost-") as folder:
        call.set(run=run or folder)
        SavedNetwork(RunFolder(run or folder).path / call.verb).build_from(network)
        yield


def _take_weights(network: nn.Module, folder: Path) -> None:
    """Load the weights of a finished training into the network of the program."""
    stateful(network).load_state_dict(load_file(folder / MODEL_NAME))


def _is_as_trained(network: nn.Module, run: str) -> bool:
    """Return whether a network has the weights of a run's student; log if it does not."""
    folder = RunFolder(run).path / "distill"
    saved = load_file(folder / MODEL_NAME) if SavedNetwork(folder).is_finished else {}
    state = stateful(network).state_dict()
    is_same = saved.keys() == state.keys() and all(
        torch.equal(saved[name], tensor.cpu()) for name, tensor in state.items()
    )
    if is_same:
        SavedNetwork(folder).build_from(network)
    else:
        logger.warning(
            "the network is not the student of run=%s, or was changed since: it is evaluated as it is, and the results "
            "are not kept",
            run,
        )
    return is_same
