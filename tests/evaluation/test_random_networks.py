"""Levels of untrained networks (evaluate.random_networks): those of weights=random, kept in the store, and refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.core.errors import ConfigError
from permafrost.evaluation import random_networks
from permafrost.evaluation.random_networks import untrained_network
from permafrost.evaluation.results import RANDOM_NETWORKS
from permafrost.models.saved import TrainedModel
from permafrost_papers.unicam.options import DistanceCorrelationOptions
from permafrost_report.main_table import summary_table
from tests.support.additive import CHANNELS, NUM_CLASSES, SIDE, additive_model, inputs_of
from tests.support.runs import TRAINER, distill_config, evaluation_of, report_config
from tests.support.verbs import distill, evaluate, report

FEW = {"splits": ("test",), "distance_correlation": DistanceCorrelationOptions(permutations=19)}
EVALUATORS = ("accuracy", "localization", "distance_correlation")


def evaluated(own, run="one", networks=None, evaluators=EVALUATORS, **options):
    options = {**FEW, "random_networks": networks, **options}
    config = evaluation_of(own, evaluators, run=run, teacher=own.config.teacher, **options)
    return evaluate.run(config)


def test_a_level_is_what_a_given_network_of_random_weights_has(own):
    (level,) = evaluated(own, networks=1).splits["test"][RANDOM_NETWORKS]

    config = evaluation_of(own, EVALUATORS, model="network", teacher=own.config.teacher, **FEW)
    network = replace(own.config.teacher, weights="random")
    alone = evaluate.run(replace(config, student=network)).splits["test"]
    assert level["accuracy"] == alone["accuracy"]
    for name in ("epg", "map_cosine", "kl_to_teacher"):
        assert level[name] == pytest.approx(alone[name], rel=1e-5)
    fss = level["distance_correlation"]["fss"]
    assert fss == pytest.approx(alone["distance_correlation"]["fss"], rel=1e-5)
    assert fss["layer1"] > 0.2  # so that 0 is no level of networks on the same images


def test_the_store_keeps_them_for_other_students_and_another_number_adds_the_missing(
    own, monkeypatch
):
    before = evaluated(own).splits["test"]
    levels = evaluated(own, networks=2).splits["test"].pop(RANDOM_NETWORKS)
    more = evaluated(own, networks=3).splits["test"]
    assert [level["records"] for level in levels] == [before["records"]] * 2
    assert levels[0]["epg"] != levels[1]["epg"]
    assert more.pop(RANDOM_NETWORKS)[:2] == levels
    assert more == before

    measured = []
    monkeypatch.setattr(random_networks, "evaluator_named", measured.append)
    assert evaluated(own, run="two", networks=2).splits["test"][RANDOM_NETWORKS] == levels
    assert measured == []


def test_a_store_that_may_only_be_read_keeps_nothing_and_the_run_does(own, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("read-only")

    caplog.set_level("INFO")
    monkeypatch.setattr(random_networks.Artifact, "save", refuse)
    levels = evaluated(own, networks=1, evaluators=("accuracy",)).splits["test"][RANDOM_NETWORKS]
    assert 0 <= levels[0]["accuracy"] <= 1
    assert "is not kept for other students: read-only" in caplog.text


def test_a_later_evaluator_measures_them_too_and_a_report_shows_them(own):
    evaluated(own, networks=2, evaluators=("accuracy", "localization"))
    later = evaluated(own, evaluators=("distance_correlation",))

    levels = later.splits["test"][RANDOM_NETWORKS]
    assert {"accuracy", "epg", "distance_correlation"} <= levels[1].keys()
    assert "random networks (2)" in later.printed()["results"]
    trained = distill_config(own, run="trained", trainer=replace(TRAINER, epochs=1))
    distill.run(trained)
    evaluated(own, run="trained", networks=2)
    made = report.run(report_config(own, "trained", format="latex"))
    html, table = Path(made.html).read_text(), Path(made.csv).read_text()
    assert "random networks & 2 &" in made.latex
    assert table.count("\nrandom networks,") == 2
    assert re.search(r"\nrandom networks +2 ", summary_table("trained"))
    assert html.count(">random networks</th>") >= 7  # the main table and those of FSS and RS


def test_a_network_that_is_always_the_same_has_no_untrained_form(own, monkeypatch):
    monkeypatch.setattr(random_networks, "build_untrained", lambda config, outputs, number: model())
    with pytest.raises(ConfigError, match=r"random_networks=2: .* returns the same weights"):
        evaluated(own, networks=2)


def model():
    torch.manual_seed(0)
    return random_networks.freeze(Wrapped())


class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1)


def test_a_partition_is_that_of_the_trained_network():
    network = additive_model(CHANNELS)
    network.assignments.copy_(network.assignments.roll(1, dims=1))
    trained = TrainedModel(
        config=replace(CHANNELS, weights=None), num_classes=NUM_CLASSES, input_size=(SIDE, SIDE)
    )
    model = random_networks.EvaluatedModel(network=network, input_size=(SIDE, SIDE))

    untrained = [untrained_network(trained, model, number) for number in range(2)]

    assert all(torch.equal(each.assignments, network.assignments) for each in untrained)
    logits = [each(inputs_of(CHANNELS)).logits for each in (network, *untrained)]
    assert not torch.equal(logits[1], logits[2])
    assert not torch.equal(logits[0], logits[1])
