"""Short runs on a small store: configurations and results."""

from __future__ import annotations

from dataclasses import replace

import torch

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import E2KDConfig
from permafrost.config.store import StoreOptions, SubsetOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import EvaluateConfig
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.runs.mirrors import RUNS
from permafrost.training.metric_log import read_metrics
from permafrost_report.options import ReportConfig, ReportOptions

PAD_CROP = AugmentOptions(operations=(OperationConfig(kind="pad_crop", padding=2),))


TWO_RANKS = TrainerOptions(
    epochs=3, batch_size=8, ranks=2, num_threads=1, log_every_steps=2, checkpoint_every_steps=3
)
TWO_RANKS_CLUSTER = LocalClusterConfig(cpus_per_rank=0.5)
TRAINER = TrainerOptions(epochs=3, batch_size=8, num_threads=1, log_every_steps=2)


def distill_config(frozen, **options):
    return DistillConfig(
        **{
            "store": StoreOptions(path=str(frozen.store.path)),
            "student": replace(frozen.config.teacher, weights=None),
            "method": E2KDConfig(tau=4.0),
            "augment": PAD_CROP,
            "optimizer": OptimizerOptions(),
            "trainer": TRAINER,
            "subset": SubsetOptions(),
            "run": "one",
            **options,
        }
    )


def evaluate_config(frozen, run="one", **options):
    return EvaluateConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        evaluate=EvaluateOptions(
            splits=options.pop("splits", ("test", "test_swapped")), num_pictures=4, **options
        ),
        run=run,
    )


def report_config(frozen, run="one", command=(), augment=PAD_CROP, **options):
    """Options of a report without cases and views of records, unless the options name some."""
    return ReportConfig(
        store=options.pop("store", None) or StoreOptions(path=str(frozen.store.path)),
        augment=augment,
        report=ReportOptions(**{"contact_records": 0, "cases": 0, **options}),
        run=run,
        command=command,
    )


def weights_of(run):
    return SavedNetwork(RUNS / run / "distill").load()[0].state_dict()


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def save_student(frozen, run, seed=5):
    config = replace(frozen.config.teacher, weights=None)
    torch.manual_seed(seed)
    folder = RUNS / run / "distill"
    folder.mkdir(parents=True)
    save_model(
        folder,
        build_model(config, 10),
        TrainedModel(
            config=config,
            num_classes=10,
            input_size=(16, 16),
            classes=tuple(frozen.store.manifest.classes),
            teachers=(frozen.store.pass_folders()[0].name,),
        ),
    )
    return folder


def evaluation_of(frozen, evaluators=None, run="one", **options):
    outer = {name: options.pop(name) for name in ("model", "teacher", "augment") if name in options}
    options = {"splits": ("test", "test_swapped"), "num_pictures": 0, **options}
    return EvaluateConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        evaluate=EvaluateOptions.from_values(options),
        evaluators=evaluators,
        run=run,
        **outer,
    )


def logged_lines(run):
    """Lines of metrics.jsonl without records_per_second, the only value that depends on time."""
    lines = list(read_metrics(RUNS / run / "distill"))
    return [{k: v for k, v in line.items() if k != "records_per_second"} for line in lines]
