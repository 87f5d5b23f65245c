"""teaching=ked: superfeatures found in a black box and saved with the store, and the teacher trained on them."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from permafrost.config.augment import AugmentOptions
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.models import CifarModelConfig, NoModelConfig, whole_frame
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core import progress
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError
from permafrost.models.compute import device_name, resolve_device
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.storage.files import file_at
from permafrost.store.reader import Store
from permafrost.training.metric_log import read_metrics
from permafrost_papers.ked import dependency
from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.options import AdditiveModelConfig, KEDTeachingConfig
from permafrost_papers.ked.partition import build_partition
from permafrost_papers.ked.search import PartitionSearch, load_partition
from permafrost_papers.probe_set import balanced_order
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_sources.options import DigitsDataConfig
from tests.support.index_table import index_table
from tests.support.items import for_each
from tests.support.ranks import run_on_ranks
from tests.support.stores import precompute_config
from tests.support.verbs import precompute, report, teach

MLP = AdditiveModelConfig(name="mlp", grid=(8, 8), input_size=8, superfeatures=1, width=16, depth=2)
EXPLAINING = replace(MLP, superfeatures=3, width=8)
STILL = AugmentOptions()
SHORT = TrainerOptions(epochs=1, batch_size=64, num_threads=1)
LABELS = LabelTeachingConfig(trainer=SHORT, augment=STILL, optimizer=OptimizerOptions(lr=0.01))
KED = KEDTeachingConfig(trainer=SHORT, augment=STILL, levels=5, records=20, max_records=20, draws=2)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """Folder with a store of digits, and the weights of a black box that is trained on it."""
    folder = tmp_path_factory.mktemp("teach_ked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = precompute_config(folder / "store", data=DigitsDataConfig(), shard_size=1024)
        precompute.run(config)
        taught = teach.run(ked_teach_config(folder, MLP, LABELS, run="black-box"))
    return folder, str(folder / taught.weights)


def ked_teach_config(folder, teacher, teaching, **options):
    return TeachConfig(
        store=StoreOptions(path=str(folder / "store")),
        teacher=teacher,
        teaching=teaching,
        evaluate=EvaluateOptions(),
        **{"run": "explaining", **options},
    )


def explaining(digits_folder, monkeypatch, tmp_path, teaching=KED, teacher=EXPLAINING, **options):
    folder, weights = digits_folder
    monkeypatch.chdir(tmp_path)
    black_box = options.pop("black_box", replace(MLP, weights=weights))
    return ked_teach_config(folder, teacher, teaching, black_box=black_box, **options)


def search_of(digits_folder, teaching=KED, teacher=EXPLAINING):
    folder, weights = digits_folder
    return PartitionSearch(
        store=Store(folder / "store"),
        black_box=whole_frame(replace(MLP, weights=weights)),  # as in a TeachConfig
        teacher=whole_frame(teacher),
        teaching=teaching,
        input_size=(8, 8),
        device=device_name(resolve_device("trainer.device", "auto")),
    )


@pytest.mark.slow
def test_the_teacher_is_trained_on_the_superfeatures_that_were_found(
    digits_folder, monkeypatch, tmp_path
):
    trainer = replace(SHORT, epochs=3)
    teaching = replace(KED, trainer=trainer, optimizer=OptimizerOptions(lr=0.01))
    config = explaining(digits_folder, monkeypatch, tmp_path, teaching)

    result = teach.run(config)

    saved = load_partition(search_of(digits_folder).folder)
    model, _ = SavedNetwork(Path(result.weights).parent).load()
    assert saved.partition.most == 5
    assert torch.equal(network_partition(model).assignments, saved.partition.assignments[:3])
    assert saved.facts.records == 20
    assert 0 < len(saved.facts.null_features) < 32  # pixels at the border of the digits are empty
    named = replace(EXPLAINING, partition=str(RUNS / "explaining" / "teach"), superfeatures=4)
    assert torch.equal(build_partition(named).assignments, saved.partition.assignments[:4])
    assert result.accuracy["test"] > 0.3  # chance is 0.1, and teachers of other seeds reach 0.7


@pytest.mark.slow
def test_a_partition_that_is_there_is_not_measured_again(digits_folder, monkeypatch, tmp_path):
    config = explaining(digits_folder, monkeypatch, tmp_path)
    teach.run(config)
    monkeypatch.setattr(PartitionSearch, "_measure", lambda *_: pytest.fail("measured again"))

    teach.run(replace(config, run="other", teacher=replace(EXPLAINING, width=5)))
    # Control: a new measurement is detected.
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        teach.run(replace(config, run="third", teaching=replace(KED, grouping_seed=1)))


def test_random_superfeatures_have_the_sizes_of_those_found(digits_folder, monkeypatch, tmp_path):
    control = replace(EXPLAINING, partition_control="random", partition_seed=1)
    result = teach.run(explaining(digits_folder, monkeypatch, tmp_path, teacher=control))

    model, _ = SavedNetwork(Path(result.weights).parent).load()
    found = load_partition(search_of(digits_folder).folder).partition.assignments[:3]
    drawn = network_partition(model).assignments
    assert torch.equal(drawn[-1].bincount().sort().values, found[-1].bincount().sort().values)
    assert not torch.equal(drawn, found)


def test_records_are_doubled_until_two_halves_agree(digits_folder, monkeypatch, caplog):
    monkeypatch.setattr(dependency, "ENOUGH", 2.0)  # no correlation reaches it
    measured = search_of(digits_folder)._measure  # measures without saving

    with caplog.at_level(logging.INFO, logger="permafrost.superfeatures"):
        total = measured(DistributedContext(), torch.device("cpu"))
        assert total.num_records == 20
        doubling = replace(KED, records=10, max_records=30)
        total = search_of(digits_folder, doubling)._measure(
            DistributedContext(), torch.device("cpu")
        )

    assert total.num_records == 30
    said = [int(n) for n in re.findall(r"in (\d+) records", caplog.text)]
    assert said == [20, 10, 20, 30]
    assert "raise teaching.max_records" in caplog.text


def test_any_beginning_of_the_records_has_as_many_of_each_class(digits_folder):
    store = Store(digits_folder[0] / "store")
    order = balanced_order(store.index, "train", 0)
    labels = index_table(store)["label"].to_numpy()

    assert sorted(order) == sorted(set(order.tolist()))
    for number in (10, 200, 500):
        assert (torch.bincount(torch.from_numpy(labels[order[:number]])) == number // 10).all()
    assert order.tolist() != balanced_order(store.index, "train", 1).tolist()


def _rank_search(rank, search, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    try:
        total = search._measure(DistributedContext(rank, 2), torch.device("cpu"))
        torch.save({"squares": total.squares, "records": total.records}, f"{folder}/{rank}.pt")
        found = search.run(DistributedContext(rank, 2), torch.device("cpu"))
        assert load_partition(found).facts.records == 20
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_partition_of_one(digits_folder, tmp_path):
    search = search_of(digits_folder, replace(KED, grouping_seed=7))
    alone = search._measure(DistributedContext(), torch.device("cpu"))
    assert not file_at(search.folder).exists()

    run_on_ranks(_rank_search, search, str(tmp_path))

    shared = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(shared[0]["squares"], shared[1]["squares"])
    assert torch.allclose(shared[0]["squares"], alone.squares, rtol=1e-12, atol=0)
    assert torch.equal(shared[0]["records"], alone.records)
    together = load_partition(search.folder)
    file_at(search.folder / "manifest.json").remove()
    assert (
        load_partition(search.run(DistributedContext(), torch.device("cpu"))).partition.sha256
        == together.partition.sha256
    )


def test_the_search_states_its_cost_and_shows_its_progress(digits_folder, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    caplog.set_level(logging.INFO)
    teaching = replace(KED, records=8, max_records=16, grouping_seed=5)

    search_of(digits_folder, teaching)._measure(DistributedContext(), torch.device("cpu"))

    # 64 features, 2 draws, and 2 ends of a difference
    assert "256 inputs of the black box for each of 8 records" in caplog.text
    assert "superfeatures: 7/8 records, about" in caplog.text
    assert "superfeatures: 8/8 records" in caplog.text


def test_the_black_box_teaches_beside_the_labels_where_it_is_asked(
    digits_folder, monkeypatch, tmp_path
):
    asked = replace(KED, lambda_kd=0.5, tau=2.0)
    teach.run(explaining(digits_folder, monkeypatch, tmp_path, asked))
    teach.run(explaining(digits_folder, monkeypatch, tmp_path, run="labels"))

    with_kd, without = (
        next(iter(read_metrics(RUNS / run / "teach"))) for run in ("explaining", "labels")
    )
    assert with_kd["total"] == pytest.approx(with_kd["ce"] + 0.5 * with_kd["kd"], rel=1e-5)
    assert "kd" not in without


def test_a_report_of_the_store_shows_its_superfeatures(digits_folder, monkeypatch, tmp_path):
    teach.run(explaining(digits_folder, monkeypatch, tmp_path))
    config = ReportConfig(
        store=StoreOptions(path=str(digits_folder[0] / "store")),
        augment=STILL,
        report=ReportOptions(contact_records=0),
    )
    page = Path(report.run(config).html).read_text()

    name = search_of(digits_folder).folder.name
    assert f"<b>{name}</b>" in page
    assert f'aria-label="Groups of {name} and its dependency matrix"' in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": CifarModelConfig()}, "set teacher=additive"),
        ({"black_box": NoModelConfig()}, "black_box=<kind> black_box.weights="),
        ({"teacher": replace(EXPLAINING, superfeatures=64)}, "teacher.superfeatures=64, but only"),
        ({"black_box": MLP}, "black_box.weights is not set"),
        ({"black_box": replace(MLP, weights="gone")}, "black_box.weights=gone does not exist"),
    ],
)
def test_what_cannot_be_found_is_said(digits_folder, monkeypatch, tmp_path, change, said):
    def ask():
        teach.run(explaining(digits_folder, monkeypatch, tmp_path, **change))

    with pytest.raises(ConfigError, match=re.escape(said)):
        ask()


@for_each(
    "option,value",
    [
        ("levels", 0),
        ("records", 0),
        ("max_records", 5),
        ("draws", 0),
        ("step", 0.0),
        ("resolution", 0.0),
        ("tau", 0.0),
        ("neighbors", 0),
        ("grouping_seed", -1),
        ("lambda_kd", -1.0),
    ],
)
def test_options_of_the_search_have_limits(option, value):
    with pytest.raises(ConfigError, match=f"teaching.{option}"):
        KEDTeachingConfig(**{"records": 10, option: value})
    with pytest.raises(ConfigError, match=r"teaching\.lambda_kd=1"):
        KEDTeachingConfig(lambda_kd=1.0, loss="bce")
