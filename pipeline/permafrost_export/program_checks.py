"""Measurements of a program on a store's own images: on their files, and in 8 bits."""

from __future__ import annotations

import logging
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from permafrost.core.label_forms import known_mask, predict_labels
from permafrost.evaluation.forward import open_split
from permafrost.loading.dataset import iter_batches
from permafrost.loading.geometry import view_images
from permafrost.models.classifier import Classifier
from permafrost.models.saved import TrainedModel
from permafrost.store.reader import Store
from permafrost.store.shard_records import content_of
from permafrost_export import predict
from permafrost_export.portable import open_program

CALIBRATION_FRAMES = 256
"""Frames of the training split from which the ranges of activations are measured, evenly spread over it."""
COMPARED_FILES = 32
_COMPARED_FRAMES = 2000
_TIMED_RUNS = 30
Output = Callable[[Tensor, int], Tensor]
"""Logits f32 [1, K] of an image f32 [1, 3, h, w] of an evaluation, and its row of the store."""


def compare_on_files(
    run: Callable[[Tensor], Tensor],
    network: Classifier,
    store: Store,
    trained: TrainedModel,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare a program on original files, decoded as predict.py does, with the student on the store's frames.

    Args:
        run: The program.
        network: The student.
        store: Store of the frames.
        trained: Facts of the student's training, with its picture.
        facts: Metadata of the program.

    Returns:
        Entries of `_compare`; none if the store does not hold the files.
    """
    if store.manifest.canonical is None or store.manifest.canonical.format != "original":
        return {}

    def on_file(_: Tensor, row: int) -> Tensor:
        data = BytesIO(content_of(store, row))
        return run(torch.from_numpy(predict.network_input(data, facts).copy()))  # type: ignore[no-untyped-call]

    outputs: dict[str, Output] = {
        "frames": lambda image, _: network(image).logits,
        "files": on_file,
    }
    return _compare(outputs, store, trained, facts, COMPARED_FILES)


def quantize(data: bytes, name: str, store: Store, trained: TrainedModel) -> bytes:
    """Return an ONNX program of one frame with weights and activations in 8 bits, between QuantizeLinear nodes.

    Args:
        data: Content of the float program.
        name: Name of its input.
        store: Store of the frames on which ranges are measured.
        trained: Facts of the student's training, with its picture.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    batches = _evaluated_images(store, trained, trained.split, CALIBRATION_FRAMES)
    inputs = ({name: _frame(image).numpy()} for images, *_ in batches for image in images[:, None])
    reader = SimpleNamespace(get_next=partial(next, inputs, None))
    with TemporaryDirectory() as folder:
        source, folded, result = (Path(folder) / f"{stage}.onnx" for stage in "abc")
        source.write_bytes(data)
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        logging.disable(logging.WARNING)  # a line for each channel whose bias widens its scale
        try:
            quantize_static(
                folded,
                result,
                reader,
                per_channel=True,
                activation_type=QuantType.QUInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        model = onnx.load(result)
    model.metadata_props.extend(onnx.ModelProto.FromString(data).metadata_props)
    return bytes(model.SerializeToString())


def compare_int8(
    programs: Mapping[str, bytes],
    name: str,
    store: Store,
    trained: TrainedModel,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the programs `float` and `int8` of one frame.

    Args:
        programs: Their contents.
        name: Name of their input.
        store: Store of the frames.
        trained: Facts of the student's training, with its picture.
        facts: Metadata of the programs.

    Returns:
        Entries of `_compare`, megabytes of each, and the milliseconds of an image: the median on one thread.
    """
    runs = {kind: open_program(data, "onnx", name, 1) for kind, data in programs.items()}
    outputs: dict[str, Output] = {
        "float": lambda image, _: runs["float"](_frame(image)),
        "int8": lambda image, _: runs["int8"](_frame(image)),
    }
    values = _compare(outputs, store, trained, facts, _COMPARED_FRAMES)
    images, *_ = next(_evaluated_images(store, trained, trained.split, 1))
    for kind, run in runs.items():
        times = timeit.repeat(partial(run, _frame(images)), number=1, repeat=_TIMED_RUNS)
        values[f"megabytes_{kind}"] = len(programs[kind]) / 1e6
        values[f"milliseconds_{kind}"] = 1000 * statistics.median(times)
    return values


def _compare(
    outputs: Mapping[str, Output],
    store: Store,
    trained: TrainedModel,
    facts: Mapping[str, Any],
    most: int,
) -> dict[str, Any]:
    """Compare two outputs on records of split test, or of one that was not trained on.

    Returns:
        The split, the number of records, the fraction with the same predicted classes, the median and the largest
        difference of a record's logits, and the accuracy of each where records have one known label.
    """
    splits = [name for name, records in store.manifest.records.items() if records]
    split = max(splits, key=lambda name: (name == "test", name != trained.split))
    with torch.no_grad():
        rows = [
            (label, *(output(image, row) for output in outputs.values()))
            for images, records, truths in _evaluated_images(store, trained, split, most)
            for image, row, label in zip(images[:, None], records, truths[:, None], strict=True)
        ]
    labels, one, other = map(torch.cat, zip(*rows, strict=True))
    limits = torch.logit(torch.tensor(facts.get("thresholds", 0.5)))
    predicted = [
        predict_labels(logits, many=facts["labels"] == "many", threshold=limits)
        for logits in (one, other)
    ]
    differences = (one - other).abs().amax(dim=1)
    is_same = (predicted[0] == predicted[1]).reshape(len(one), -1).all(dim=1)
    values = {
        "split": split,
        "records": len(one),
        "same_class": float(is_same.double().mean()),
        "median_difference": float(differences.median()),
        "largest_difference": float(differences.max()),
    }
    if facts["labels"] == "one" and (known := known_mask(labels)).any():
        values |= {
            f"accuracy_{name}": float((classes == labels)[known].double().mean())
            for name, classes in zip(outputs, predicted, strict=True)
        }
    return values


def _evaluated_images(
    store: Store, trained: TrainedModel, split: str, most: int
) -> Iterator[tuple[Tensor, list[int], Tensor]]:
    """Iterate over evenly spread records: images f32 [B, 3, h, w] of an evaluation, rows of the store, and labels."""
    dataset = open_split(store, [], split, trained, with_regions=False)
    assert trained.picture is not None
    chosen = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int).tolist()
    for batch in iter_batches(dataset, 32, chosen):
        rows = np.asarray(dataset.rows)[batch.record_index.numpy()].tolist()
        yield view_images(batch, trained.picture.size), rows, batch.labels


def _frame(image: Tensor) -> Tensor:
    """Return an image in [0, 1] as the input u8 of a program of frames."""
    return (image * 255).round().to(torch.uint8)
