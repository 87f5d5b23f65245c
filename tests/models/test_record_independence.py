"""Outputs that depend on other records of a batch, on its order, or on earlier batches, are refused at every door."""

import copy

import pytest
import torch
from torch import nn

import permafrost
from permafrost.core.errors import ConfigError
from permafrost.models.module import ModuleClassifier
from permafrost.models.record_independence import (
    DependentRecordsError,
    probe_positions,
    require_independent_records,
)
from permafrost_export.portable import trace


class Network(nn.Module):
    """A small network of a convolution and a head, of whose features `change` makes others."""

    def __init__(self, change, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.change = change
        self.head = nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.change(self.conv(images)).mean(dim=(2, 3)))


class Always(nn.Module):
    """A batch norm that stays in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def train(self, mode=True):
        return super().train(True)

    def forward(self, features):
        return self.norm(features)


class ActNorm(nn.Module):
    """A scale that the first batch sets, with the flag in a buffer or in an attribute."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(8))
        self.is_set = False

    def forward(self, features):
        if not self.is_set:
            self.is_set = True
            self.log_scale.data.copy_(features.std(dim=(0, 2, 3)).log())
        return features * (-self.log_scale).exp()[:, None, None]


class Attributes(nn.Module):
    """A mean that the first batch sets, in an attribute that is no buffer."""

    mean = None

    def forward(self, features):
        if self.mean is None:
            self.mean = features.mean(dim=(0, 2, 3), keepdim=True)
        return features - self.mean


class Counting(nn.Module):
    """A buffer that counts batches, and weighs them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, features):
        self.batches += 1
        return features * self.batches


class Momentum(nn.Module):
    """A running mean that is no buffer, so that only outputs tell."""

    def __init__(self):
        super().__init__()
        self.mean = 0.0

    def forward(self, features):
        self.mean = 0.5 * self.mean + 0.5 * features.mean().item()
        return features - self.mean


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features):
        return self.function(features)


def attend_to_positions(features):
    tokens = features.flatten(2).transpose(1, 2)
    mixed = (tokens @ tokens.transpose(1, 2)).softmax(2) @ tokens
    return mixed.transpose(1, 2).reshape(features.shape)


DEPENDENT = {
    "batch norm without running statistics": nn.BatchNorm2d(8, track_running_stats=False),
    "batch norm in training mode": Always(),
    "mean of the batch": Function(lambda x: x - 0.2 * x.mean(dim=0)),
    "maximum of the batch": Function(lambda x: x / x.abs().amax()),
    "the first record": Function(lambda x: x + 0.1 * x[:1]),
    "the neighbor": Function(lambda x: x + 0.1 * x.roll(1, 0)),
    "the place in the batch": Function(
        lambda x: x * torch.arange(1, len(x) + 1)[:, None, None, None]
    ),
    "the size of the batch": Function(lambda x: x * len(x)),
    "attention over records": Function(
        lambda x: (x.flatten(1) @ x.flatten(1).T).softmax(1).mm(x.flatten(1)).view_as(x)
    ),
    "a buffer that counts": Counting(),
    "a mean that is no buffer": Momentum(),
    "the first batch": ActNorm(),
    "the first batch, in attributes": Attributes(),
    "noise": Function(lambda x: x + 0.1 * torch.randn_like(x)),
    "dropout in eval mode": Function(lambda x: nn.functional.dropout(x, 0.3, training=True)),
}
INDEPENDENT = {
    "identity": nn.Identity(),
    "batch norm": nn.BatchNorm2d(8),
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8),
    "instance norm that tracks": nn.InstanceNorm2d(8, track_running_stats=True),
    "dropout": nn.Dropout(0.5),
    "an attention of positions": Function(attend_to_positions),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("seed", range(3))
def test_explain_refuses_outputs_that_depend_on_other_records(name, seed):
    torch.manual_seed(seed)
    network = Network(copy.deepcopy(DEPENDENT[name])).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}

    with pytest.raises(ConfigError) as error:
        permafrost.explain(network, torch.rand(6, 3, 16, 16), layer="conv")

    words = "in eval mode" if name not in ("noise", "dropout in eval mode") else "random in eval"
    assert words in str(error.value)
    if name == "batch norm without running statistics":
        assert "'change' normalizes by the statistics of the batch" in str(error.value)
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)  # nothing was initialized


@pytest.mark.parametrize("name", INDEPENDENT)
def test_other_layers_are_explained(name):
    network = Network(INDEPENDENT[name])

    assert permafrost.explain(network, torch.rand(6, 3, 16, 16), layer="conv").maps.shape[0] == 6


def test_the_first_batch_of_a_training_initializes_and_no_trial_does():
    network = Network(ActNorm())
    student = ModuleClassifier(network, "conv", may_initialize=True).train()
    images = 3 * torch.rand(4, 3, 16, 16)

    student(images)

    expected = network.conv(images).std(dim=(0, 2, 3)).log()
    torch.testing.assert_close(network.change.log_scale.data, expected)


def test_an_exported_program_of_such_a_student_is_refused():
    class Rows(nn.Module):
        def forward(self, rows):
            return nn.functional.batch_norm(rows, None, None, training=True)

    with pytest.raises(DependentRecordsError, match="the student computes different outputs"):
        trace(Rows(), torch.randn(4, 5))


def test_rounding_is_no_dependence():
    """A product of matrices has other last bits in another batch, and outputs with a large offset more of them."""
    weight = torch.randn(300, 50)

    def run(records):
        return [records @ weight / 17 + 100, (records.half() @ weight.half())]

    records = torch.rand(4, 300)
    require_independent_records("it", nn.Identity(), run, records[:3], records[3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_with_autocast_inside_is_explained_as_without_it(dtype):
    class Mixed(Network):
        def forward(self, images):
            with torch.autocast("cpu", dtype):
                features = self.conv(images)
                logits = self.head(features.mean(dim=(2, 3)))
            return logits.float()

    torch.manual_seed(0)
    network, images = Mixed(nn.Identity()), torch.rand(6, 3, 16, 16)
    explained = permafrost.explain(network, images, layer="conv")

    exact = Network(nn.Identity())
    exact.load_state_dict(network.state_dict())
    expected = permafrost.explain(exact, images, layer="conv", target_class=explained.target_class)
    torch.testing.assert_close(explained.logits, expected.logits, atol=0.01, rtol=0)
    torch.testing.assert_close(
        explained.maps, expected.maps, atol=0.02 * expected.maps.max().item(), rtol=0
    )


def test_a_small_dependence_is_one():
    weight = torch.randn(300, 50)

    def run(records):
        outputs = records @ weight
        return [outputs - 0.01 * outputs.mean(dim=0)]

    records = torch.rand(5, 300)
    with pytest.raises(DependentRecordsError, match="in a batch of one"):
        require_independent_records("it", nn.Identity(), run, records[:3], records[3:])


@pytest.mark.parametrize(
    ("records", "positions"), [(0, []), (1, []), (2, [0, 1, 1, 1]), (9, [0, 1, 2, 4, 8])]
)
def test_probed_positions_are_of_the_start_the_middle_and_the_end(records, positions):
    assert probe_positions(records) == positions
