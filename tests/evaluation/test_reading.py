"""Reading of an evaluation: threads and batches that are copied ahead change no result."""

import os
import threading
from functools import partial

import pandas as pd
import pytest
import torch

from permafrost.config.evaluation import EvaluateOptions
from permafrost.evaluation import context, forward
from permafrost.evaluation.forward import evaluate_model
from permafrost.loading import dataset as dataset_module
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.subset import rows_of_split
from permafrost.loading.transfer import iter_on_device, move_batch, read_ahead
from permafrost.runs.mirrors import RUNS
from permafrost.store.frames import InputMemory
from permafrost_evaluators.options import ShiftOptions
from tests.support.papers import needs_papers
from tests.support.runs import evaluation_of, save_student
from tests.support.verbs import evaluate

CPU = torch.device("cpu")


@pytest.fixture
def decoding(monkeypatch):
    """Names of the threads that decode, with files of any size decoded in threads."""
    monkeypatch.setattr(dataset_module, "_SMALL_FILE", 0)
    found = set()
    decode = InputMemory.decode

    def noted(self, *read):
        found.add(threading.current_thread().name.rpartition("_")[0])
        decode(self, *read)

    monkeypatch.setattr(InputMemory, "decode", noted)
    return found


@pytest.fixture
def ahead(monkeypatch):
    """Copy batches ahead, also on a CPU, and note how many were read that way."""
    copied = []

    def copy(device, batch):
        copied.append(threading.current_thread().name)
        return move_batch(batch, device)

    for reader in (forward, context):
        monkeypatch.setattr(
            reader,
            "iter_on_device",
            lambda batches, device: (
                moved for _, moved in read_ahead(batches, partial(copy, device))
            ),
        )
    return copied


def results_of(frozen, run, threads):
    save_student(frozen, run)
    config = evaluation_of(
        frozen,
        ("accuracy", "localization", "shift", "gradient_alignment", "class_similarity"),
        run=run,
        batch_size=5,
        decode_threads=threads,
        shift=ShiftOptions(pixels=2, records=6),
    )
    splits = evaluate.run(config).splits
    return splits, pd.read_parquet(RUNS / run / "evaluate" / "records.parquet")


@needs_papers
def test_threads_and_batches_ahead_change_no_bit_of_an_evaluation(frozen, decoding, request):
    plain, records = results_of(frozen, "plain", 1)
    assert decoding in ({"MainThread"}, {""}, {"read-ahead"})  # the last one on a GPU
    decoding.clear()
    copied = request.getfixturevalue("ahead")

    fast, own = results_of(frozen, "fast", 3)

    assert decoding == {"decode"}
    assert set(copied) == {"read-ahead_0"}
    assert fast == plain
    pd.testing.assert_frame_equal(own, records)


@pytest.mark.parametrize(
    ("cores", "options", "threads"), [(3, {}, 3), (3, {"decode_threads": 2}, 2)]
)
def test_an_evaluation_decodes_on_all_cores_of_its_machine(
    frozen, monkeypatch, cores, options, threads
):
    save_student(frozen, "one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    found = []
    build = StoreDataset.__init__
    monkeypatch.setattr(
        StoreDataset,
        "__init__",
        lambda *a, **o: found.append(o["decode_threads"]) or build(*a, **o),
    )

    evaluate.run(evaluation_of(frozen, ("accuracy",), **options))
    evaluate_model(RUNS / "one" / "distill", frozen.store, EvaluateOptions.from_values(options))

    assert set(found) == {threads}


def test_positions_are_read_in_their_order_and_in_batches(frozen):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "test"))

    found = [batch.record_index.tolist() for batch in iter_batches(dataset, 2, [4, 1, 1, 0, 3])]

    assert found == [[4, 1], [1, 0], [3]]


def test_an_evaluation_that_ends_early_leaves_no_thread(frozen, ahead):
    dataset = StoreDataset(frozen.store, rows_of_split(frozen.store.index, "test"))
    before = set(threading.enumerate())
    batches = iter_on_device(iter_batches(dataset, 2), CPU)
    next(batches)

    batches.close()

    assert not {t for t in set(threading.enumerate()) - before if t.is_alive()}
