"""Averages of the weights (trainer.ema): timm's on the same steps, what is saved, resumed and equal on every rank."""

from dataclasses import replace

import pytest
import torch

from permafrost.config.distillation import CurveOptions
from permafrost.config.methods import KDConfig
from permafrost.core.errors import ConfigError
from permafrost.runs.mirrors import RUNS
from permafrost.store.facts import read_sheets
from permafrost.training import loop
from tests.support.kills import killed_at
from tests.support.ranks import join_group, leave_group, run_on_ranks
from tests.support.runs import (
    TRAINER,
    assert_equal_states,
    distill_config,
    evaluate_config,
    logged_lines,
    weights_of,
)
from tests.support.trainings import build_training, take_steps
from tests.support.verbs import distill, evaluate

AVERAGED = replace(TRAINER, ema=0.9)


def averaged_training(seed=0):
    training = build_training(seed, KDConfig())
    training.model.register_buffer("numbers", torch.arange(100))  # 7 is no 6.9999995
    training.ema = 0.9
    return training


def test_the_average_is_that_of_timm_on_the_same_steps():
    model_ema = pytest.importorskip("timm.utils.model_ema")
    training = averaged_training()
    expected = model_ema.ModelEmaV3(training.model, decay=0.9)

    for step in range(5):
        take_steps(training, range(step, step + 1))
        expected.update(training.model, step=step + 1)

    assert_equal_states(training.network.state_dict(), expected.module.state_dict())
    assert not torch.equal(next(training.network.parameters()), next(training.model.parameters()))


def test_the_average_is_saved_evaluated_and_on_the_curve(frozen):
    config = distill_config(frozen, trainer=AVERAGED, curve=CurveOptions(splits=("test",)))
    last = replace(config, run="last", trainer=TRAINER)
    for each in (config, last):
        distill.run(each)

    average = read_sheets(RUNS / "one/distill")["student"]["average"]
    assert average.value == "of the weights over about 10 steps, of 15 in all"
    assert average.is_doubtful
    states = weights_of("one"), weights_of("last")
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    values = evaluate.run(evaluate_config(frozen, splits=("test",))).splits["test"]
    assert logged_lines("one")[-1]["curve/test/accuracy"] == values["accuracy"]


def test_a_resumed_training_has_the_average_of_an_undisturbed_one(frozen, caplog):
    caplog.set_level("INFO")
    trainer = replace(AVERAGED, checkpoint_every_steps=3)
    distill.run(distill_config(frozen, run="undisturbed", trainer=trainer))
    with killed_at(loop, "save_checkpoint", 3):
        distill.run(distill_config(frozen, trainer=trainer))
    distill.run(distill_config(frozen, trainer=trainer))

    assert "continues from the checkpoint: epoch 2 of 3, after 5 steps" in caplog.text
    assert_equal_states(weights_of("one"), weights_of("undisturbed"))


def test_another_decay_is_another_training(frozen):
    distill.run(distill_config(frozen, trainer=AVERAGED))
    with pytest.raises(ConfigError, match=r"trainer\.ema 0\.9 -> not set"):
        distill.run(distill_config(frozen))


def average_on_rank(rank, folder):
    training = averaged_training(rank)
    training.distributed = join_group(rank, folder)
    training.__post_init__()  # which wraps the model for the ranks
    take_steps(training, range(10 * rank, 10 * rank + 3))
    torch.save(dict(training.network.named_parameters()), folder / f"{rank}.pt")
    leave_group()


def test_ranks_have_the_same_average(tmp_path):
    run_on_ranks(average_on_rank, tmp_path)
    assert_equal_states(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))
