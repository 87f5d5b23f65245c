"""The loss of a step is one graph, from the images of a batch to its terms, as the capture of a step would need."""

from functools import cache

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from permafrost.training import loop
from permafrost.training.step import batch_loss
from tests.support.settings import PASSES, TRAININGS, pass_config, training_config
from tests.support.verbs import distill, precompute

FEW = ("e2kd.strong",)
_DRAWS = ("crd", "crd.live")
"""Methods that draw in each step, so that two losses of one batch differ."""
_WITHOUT_CLOSED_FORM = ("vit", "vit.bfloat16")
"""Students whose explanation is a gradient of their head, which a graph does not contain."""


class StepReachedError(Exception):
    """End of a training before the step that is looked at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


@cache
def write_pass(folder, name):
    precompute.run(pass_config(name, **PASSES[name]))


def second_step(name, folder):
    """Return the state, the batch and the size of images of the second step of a training."""
    options = TRAININGS[name]
    reads = options.get("teacher", "frozen")
    for teacher in (reads,) if isinstance(reads, str) else reads:
        write_pass(folder, teacher)
    if name == "several":
        write_pass(folder, "several_classes")
    steps = []

    def step(training, batch, size, *arguments):
        steps.append((training, batch, size))
        if len(steps) == 2:
            raise StepReachedError
        return original(training, batch, size, *arguments)

    original = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(StepReachedError):
            distill.run(training_config(name, **options))
    return steps[1]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in TRAININGS
        if name not in _WITHOUT_CLOSED_FORM
    ],
)
def test_the_loss_of_a_batch_is_one_graph(folder, name):
    training, batch, size = second_step(name, folder)
    training.model.train()
    torch._dynamo.reset()
    eager = batch_loss(training, batch, size).total
    graph = torch.compile(batch_loss, fullgraph=True, backend="eager")(training, batch, size).total
    assert graph.requires_grad
    if name not in _DRAWS:
        torch.testing.assert_close(graph, eager)


def test_a_loss_that_reads_a_value_is_not_one_graph(folder, monkeypatch):
    """The control: what waits for a device breaks the graph."""
    training, batch, size = second_step("kd", folder)
    original = type(training.loss).forward
    monkeypatch.setattr(
        type(training.loss),
        "forward",
        lambda *words: original(*words) if words[1].logits.sum().item() else None,
    )
    torch._dynamo.reset()
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)):
        torch.compile(batch_loss, fullgraph=True, backend="eager")(training, batch, size)
