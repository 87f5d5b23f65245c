"""Metrics of a training on a disk that is full: events are left out, and any other file is named."""

import errno
import itertools
import logging
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from permafrost.storage.local_files import NoSpaceError
from permafrost.training import event_log
from permafrost.training.event_log import EventLog
from permafrost.training.metric_log import MetricWriter, read_metrics
from tests.support.run_files import write_lines

LINES = [{"total": 1.5, "lr": 0.1, "step": 4, "epoch": 0}, {"total": 0.5, "step": 8, "epoch": 1}]


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_reads_the_numbers_of_each_line_at_its_step(tmp_path):
    write_lines(tmp_path, LINES)
    assert scalars(tmp_path / "tensorboard") == {"total": [(4, 1.5), (8, 0.5)], "lr": [(4, 0.1)]}


@pytest.mark.parametrize("before", [0, 8])
def test_events_of_a_killed_run_are_replaced_from_the_step_at_which_it_goes_on(
    tmp_path, monkeypatch, before
):
    """Also by the tenth file of a process, whose number has a digit more."""
    monkeypatch.setattr(event_log, "_numbers", itertools.count(before))
    for first_step, line in ((1, LINES[0]), (5, LINES[1]), (5, {"total": 9.0, "step": 8})):
        log = EventLog(tmp_path, first_step)
        log.add(line)
        log.close()
    assert scalars(tmp_path)["total"] == [(4, 1.5), (8, 9.0)]


@pytest.fixture
def full_disk(monkeypatch):
    """Function after which files whose names begin with a word are on a full disk."""
    opened = Path.open

    def fill(beginning):
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, *words, **options: opened(
                Path("/dev/full") if path.name.startswith(beginning) else path, *words, **options
            ),
        )

    return fill


def test_a_training_goes_on_without_events_where_they_have_no_room(tmp_path, full_disk, caplog):
    full_disk("events.")
    with caplog.at_level(logging.WARNING, "permafrost"):
        write_lines(tmp_path, LINES)
    (warning,) = caplog.messages
    assert "tensorboard/events.out.tfevents." in warning
    assert os.strerror(errno.ENOSPC) in warning
    assert list(read_metrics(tmp_path)) == LINES


def test_a_folder_that_cannot_be_created_is_one_warning_too(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    with caplog.at_level(logging.WARNING, "permafrost"):
        write_lines(tmp_path, LINES)
    assert len(caplog.messages) == 1


def test_metrics_that_have_no_room_name_their_file(tmp_path, full_disk):
    full_disk("metrics.")
    with (
        MetricWriter(tmp_path, 0) as writer,
        pytest.raises(NoSpaceError, match=r"no room to write .*metrics\.jsonl"),
    ):
        writer.write(LINES[0])
