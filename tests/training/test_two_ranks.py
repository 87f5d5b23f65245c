"""Training with two ranks equals training with one process on the whole batch; three repeat their own sums."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from permafrost.config.methods import E2KDConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.distributed import DistributedContext, RanksDisagreeError
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.losses.base import LossTerms, build_loss
from permafrost.models.explanations import explainer_named
from permafrost.models.providers import build_model
from permafrost.store.reader import Store
from permafrost.training.checkpoint import load_checkpoint, save_checkpoint
from permafrost.training.metric_log import StepLog
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from permafrost_papers.bcos.options import BcosModelConfig, BcosWeightsConfig
from tests.support.ranks import join_group, leave_group, run_on_ranks
from tests.support.runs import PAD_CROP
from tests.support.slow import slow
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.verbs import precompute

SIZE = (TINY_DATA.image_size, TINY_DATA.image_size)
METHOD = E2KDConfig(tau=4.0, lambda_ce=1.0, lambda_map=5.0)


def build_stream(path, distributed):
    store = Store(path)
    rows = rows_of_split(store.index, "train")
    return TrainLoader(
        StoreDataset(store, rows, store.open_passes()),
        ViewSchedule(PAD_CROP, store.size, seed=0),
        batch_size=8,
        seed=0,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )


def rank_training(model_config, distributed):
    torch.manual_seed(distributed.rank)  # DDP then broadcasts the weights of the first rank
    model = build_model(model_config, 10)
    optimizer = build_optimizer(OptimizerOptions(), list(model.parameters()))
    return Training(
        model=model,
        loss=build_loss(METHOD),
        optimizer=optimizer,
        distributed=distributed,
        explain=explainer_named(model.explainer),
    )


def learn(store_path, model_config, distributed):
    """Process three batches with BatchNorm in eval mode. Return their keys, views and gradients, and a log line."""
    training = rank_training(model_config, distributed)
    training.model.eval()
    training.forward.eval()
    seen = []
    lines = []
    log = StepLog(write=lines.append, every_steps=3)
    for batch in list(build_stream(store_path, distributed).epoch(1))[:3]:
        training.optimizer.zero_grad()
        terms = batch_loss(training, batch, SIZE)
        terms.total.backward()
        training.global_step += 1
        log.add(training, terms, len(batch.keys))
        gradients = [parameter.grad.clone() for parameter in training.model.parameters()]
        seen.append((batch.keys, batch.canonical_from_view, gradients))
    log.flush(training)
    return {"seen": seen, "line": lines[0]}


def train_rank(rank, folder, store_path, model_config):
    distributed = join_group(rank, folder)
    torch.save(learn(store_path, model_config, distributed), folder / f"{rank}.pt")
    own = folder / "shared" if rank == 0 else folder / "elsewhere"
    training = rank_training(model_config, distributed)
    if rank == 0:
        own.mkdir()
        training.global_step = 7
        save_checkpoint(training, own)
    try:
        load_checkpoint(training, own)
    except RanksDisagreeError as error:
        (folder / f"disagreed-{rank}").write_text(str(error))
    leave_group()


def bcos_teacher_store(folder):
    """Write a store with the weights of a B-cos teacher as maps, and return its path with the teacher's config."""
    teacher = BcosModelConfig(name="resnet8", width=4, weights="random")
    config = precompute_config(folder / "store", teacher, explainer=BcosWeightsConfig())
    precompute.run(config)
    return Path(config.store.path), config.teacher


@pytest.fixture(scope="module", params=["gradcam", slow("bcos_weights")])
def both(request, tmp_path_factory, frozen):
    """Folder, results of two gloo ranks, and results of a single process."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (frozen.store.path, frozen.config.teacher)
    if request.param == "bcos_weights":
        arguments = bcos_teacher_store(folder)
    run_on_ranks(train_rank, folder, *arguments)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, ranks, learn(*arguments, DistributedContext())


def test_two_ranks_have_the_global_batches_and_the_views_of_one(both):
    _, ranks, alone = both

    for first, second, whole in zip(*(part["seen"] for part in (*ranks, alone)), strict=True):
        assert first[0] + second[0] == whole[0]
        assert torch.equal(torch.cat([first[1], second[1]]), whole[1])


def test_two_ranks_have_the_gradients_of_one(both):
    _, ranks, alone = both

    assert alone["line"]["map"] > 0.01  # the gradients include the map term
    for first, second, whole in zip(*(part["seen"] for part in (*ranks, alone)), strict=True):
        for one, other, wanted in zip(first[2], second[2], whole[2], strict=True):
            assert torch.equal(one, other)
            assert (one - wanted).norm() <= 1e-6 * max(1.0, wanted.norm())


def test_the_log_has_the_mean_over_ranks(both):
    _, ranks, alone = both

    for name in ("total", "kd", "ce", "map", "valid_map_fraction"):
        assert ranks[0]["line"][name] == pytest.approx(alone["line"][name], rel=1e-5)


def test_ranks_that_see_different_checkpoints_say_that_the_folder_is_not_shared(both):
    folder, _, _ = both

    for rank in range(2):
        assert "storage that all nodes share" in (folder / f"disagreed-{rank}").read_text()


def average_twice(rank, folder, model_config):
    """Save the averaged gradients of two equal steps of a process, and this rank's own gradients."""
    distributed = join_group(rank, folder, 3)
    torch.manual_seed(0)
    alone = build_model(model_config, 10).eval()
    wrapped = distributed.wrap(deepcopy(alone), alone.device)
    images = torch.rand(4, 3, *SIZE, generator=torch.Generator().manual_seed(rank))
    steps = [gradients(wrapped, images) for _ in range(2)]
    torch.save([*steps, gradients(alone, images)], folder / f"{rank}.pt")
    leave_group()


def gradients(model, images):
    model.zero_grad()
    model(images).logits.logsumexp(1).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_three_ranks_add_gradients_in_their_order_from_the_first_step_on(frozen, tmp_path):
    run_on_ranks(average_twice, tmp_path, frozen.config.teacher, ranks=3)

    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    first, second, third = (own for _, _, own in ranks)
    for step, later, _ in ranks:
        assert torch.equal(step, (first + second + third) / 3)
        assert torch.equal(step, later)


def test_a_checkpoint_of_another_number_of_ranks_is_a_warning(frozen, caplog):
    training = rank_training(frozen.config.teacher, DistributedContext())
    training.load_state(training.state())
    assert caplog.text == ""

    training.load_state(training.state() | {"ranks": 3})

    assert "the checkpoint is from trainer.ranks=3; on trainer.ranks=1, " in caplog.text


def test_gradients_of_a_losss_own_parameters_are_averaged(monkeypatch):
    monkeypatch.setattr(DistributedContext, "sum", lambda ranks, values: values + 3.0)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 5.0])

    DistributedContext(0, 2).average_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])

    assert parameter.grad.tolist() == [2.0, 4.0]


def test_a_lone_process_needs_no_group():
    values = torch.tensor([1.0, 2.0])

    assert DistributedContext().mean(values) is values
    DistributedContext().require_equal([1], "never")
    assert LossTerms(total=values.sum()).total == 3
