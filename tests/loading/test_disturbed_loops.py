"""Iterations of a loader beside other code of the process and other iterations: their own batches, or one sentence."""

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, WeightedRandomSampler

import permafrost
from permafrost.core.errors import ConfigError
from permafrost.core.generators import SeededDraws
from permafrost.loading.loader import BatchMessage
from permafrost.loading.sampler import GlobalBatchSampler
from tests.support.slow import slow


@pytest.fixture
def records(frozen):
    return permafrost.open_store(frozen.store.path).select("train")


def loader_of(records, **options):
    views = permafrost.augmentation(options.pop("views", "pad_crop_flip"))
    return permafrost.RecordLoader(
        records, **{"batch_size": 8, "augment": views, "seed": 3} | options
    )


def contents(loader):
    return [(batch.keys, batch.images.clone(), batch.maps.clone()) for batch in loader]


def assert_equal(one, other):
    assert [keys for keys, *_ in one] == [keys for keys, *_ in other]
    for (_, *tensors), (_, *others) in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize(
    "views", ["pad_crop_flip", "resized_crop_flip", "pad_crop_flip_randaugment"]
)
def test_views_depend_on_no_other_thread(records, views):
    expected = contents(loader_of(records, views=views))
    results, stop = [], threading.Event()

    def disturb():
        while not stop.is_set():
            torch.manual_seed(1)
            torch.rand(3)
            np.random.seed(1)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    readers = [
        threading.Thread(target=lambda: results.append(contents(loader_of(records, views=views))))
        for _ in range(3)
    ]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    disturbing.join()

    assert len(results) == 3
    for result in results:
        assert_equal(result, expected)


def test_views_do_not_touch_the_global_generators(records):
    torch.manual_seed(5)
    before = torch.get_rng_state()

    contents(loader_of(records))

    assert torch.equal(torch.get_rng_state(), before)


def test_views_are_the_same_under_another_default_dtype(records):
    expected = contents(loader_of(records))
    torch.set_default_dtype(torch.float64)
    try:
        actual = contents(loader_of(records))
    finally:
        torch.set_default_dtype(torch.float32)

    assert_equal(actual, expected)


def test_draws_of_a_seed_are_those_of_the_global_generator():
    def draw():
        return [
            torch.rand(3), torch.randperm(9), torch.randint(0, 9, (4,)), torch.randn(2, 2),
            torch.empty(5).uniform_(-1, 1), torch.empty(5).normal_(), torch.rand(6).bernoulli(),
            torch.nn.Linear(3, 4).weight.detach(), torch.nn.init.kaiming_normal_(torch.empty(3, 3)),
            torch.nn.init.trunc_normal_(torch.empty(7)), torch.nn.init.orthogonal_(torch.empty(3, 3)),
        ]  # fmt: skip

    torch.manual_seed(11)
    expected = draw()
    torch.manual_seed(12)
    before = torch.get_rng_state()
    with SeededDraws(11):
        actual = draw()

    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# ---- iterations ------------------------------------------------------------------------------------


def test_interleaved_iterations_have_the_batches_of_their_own_epochs(records):
    whole = loader_of(records)
    first, second = contents(whole), contents(whole)
    loader = loader_of(records)

    pairs = list(zip(iter(loader), iter(loader), strict=True))

    assert [batch.keys for batch, _ in pairs] == [keys for keys, *_ in first]
    assert [batch.keys for _, batch in pairs] == [keys for keys, *_ in second]


def test_threads_that_share_a_loader_have_an_epoch_each(records):
    whole = loader_of(records)
    expected = [[keys for keys, *_ in contents(whole)] for _ in range(4)]
    loader, results = loader_of(records), []
    threads = [
        threading.Thread(target=lambda: results.append([batch.keys for batch in loader]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(results) == sorted(expected)


def test_an_iteration_that_lost_its_worker_processes_says_so(records):
    loader = loader_of(records, num_workers=1)
    older = iter(loader)
    assert next(older).keys
    newer = iter(loader)
    expected = [keys for keys, *_ in contents(loader_of(records))]
    second = loader_of(records)
    list(second)
    assert next(newer).keys == next(iter(second)).keys != expected[0]

    with pytest.raises(ConfigError, match="another iteration of this RecordLoader has begun"):
        next(older)
    assert len(list(newer)) == len(expected) - 1  # the newer one is not disturbed


@pytest.mark.parametrize("num_workers", [0, slow(1)])
def test_a_loop_that_was_left_does_not_disturb_the_next(records, num_workers):
    whole = loader_of(records)
    list(whole)
    expected = [batch.keys for batch in whole]
    loader = loader_of(records, num_workers=num_workers)
    for _ in loader:
        break

    assert [batch.keys for batch in loader] == expected


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled])
def test_a_copy_of_a_loader_reads_the_same(records, copied):
    loader = loader_of(records)
    expected = contents(loader)
    loader.set_epoch(0)

    assert_equal(contents(copied(loader)), expected)


def test_changed_images_are_moved_with_their_changes(records):
    batch = next(iter(loader_of(records)))
    batch.images.mul_(0)

    assert not batch.to("cpu").images.any()
    untouched = next(iter(loader_of(records)))
    assert untouched.to("cpu").images.any()


def test_a_program_may_change_its_folder_after_it_has_opened_a_store(frozen, tmp_path, monkeypatch):
    monkeypatch.chdir(frozen.store.path.parent)
    opened = permafrost.open_store(frozen.store.path.name)
    (tmp_path / frozen.store.path.name).mkdir()

    monkeypatch.chdir(tmp_path)

    loader = permafrost.RecordLoader(opened.select("train"), batch_size=8)
    assert next(iter(loader)).maps.any()


def test_a_text_as_classes_is_refused(frozen):
    with pytest.raises(ConfigError, match="classes='3' is a text; give a list of names"):
        permafrost.open_store(frozen.store.path).select("train", classes="3")


# ---- samplers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 5, 5)}, "batch_size=8, but 5 records"),
        ({"sampler": []}, "batch_size=8, but 0 records"),
        ({"sampler": [-1] * 8}, "position -1 of a batch is not an integer from 0 to"),
        ({"sampler": [10**6] * 8}, "position 1000000 of a batch"),
        ({"sampler": [1.5] * 8}, "position 1.5 of a batch"),
        ({"batch_sampler": [[0, -3]]}, "position -3 of a batch"),
        ({"batch_sampler": [[]]}, "a batch of no positions"),
        (
            {"sampler": range(8), "shuffle": True},
            "shuffle=True and a sampler both decide the order",
        ),
        ({"batch_size": True}, "batch_size=True must be a positive whole number"),
        ({"batch_size": 4.0}, "batch_size=4.0 must be a positive whole number"),
        ({"batch_size": 0}, "batch_size=0 must be a positive whole number"),
    ],
)
def test_what_gives_no_batch_is_one_sentence(records, options, words):
    with pytest.raises(ConfigError, match=words):
        list(loader_of(records, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": np.arange(8)},
        {"sampler": torch.arange(8)},
        {"batch_sampler": BatchSampler(range(8), 8, drop_last=False)},
        {"batch_size": np.int64(8), "sampler": range(8)},
        {"sampler": WeightedRandomSampler([1.0] * 8, 8)},
    ],
)
def test_other_samplers_give_their_batches(records, options):
    (batch,) = list(loader_of(records, **options))

    assert len(batch.keys) == 8


# ---- other libraries ---------------------------------------------------------------------------------


def test_parts_of_a_loader_in_another_loader_are_one_sentence(records):
    """As Accelerate's prepare() makes a DataLoader of the parts, and Lightning a sampler of the sampler's class."""
    loader = loader_of(records)
    other = torch.utils.data.DataLoader(
        loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
    )
    message = next(iter(other))
    assert isinstance(message, BatchMessage)
    for use in (lambda: message.images, lambda: hasattr(message, "to"), lambda: message.keys):
        with pytest.raises(ConfigError, match=r"leave it out of Accelerate's prepare\(\)"):
            use()
    assert pickled(message).batch.keys

    with pytest.raises(ConfigError, match="set use_distributed_sampler=False of Lightning"):
        GlobalBatchSampler(
            torch.utils.data.SequentialSampler(range(9)), batch_size=2, drop_last=False
        )


def test_a_program_from_a_pipe_is_told_what_it_is(frozen, tmp_path):
    program = f"""
import permafrost
records = permafrost.open_store({str(frozen.store.path)!r}).select("train")
if __name__ == "__main__":
    for batch in permafrost.RecordLoader(records, num_workers=1):
        break
"""
    process = subprocess.run(
        [sys.executable, "-"],
        input=program,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert process.returncode != 0
    assert "one that is read from a pipe or typed has no file" in process.stderr
    assert "main" not in process.stderr.splitlines()[-1].partition("Each imports")[2]
