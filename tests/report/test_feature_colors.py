"""Features as colors: their principal components, on the sheet of a store and on the page of a report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.config.methods import KDConfig
from permafrost.config.store import PassOptions
from permafrost.evaluation.map_colors import feature_colors
from permafrost.evaluation.results import load_written
from permafrost.evaluation.saved_records import PICTURES_NAME
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_report.options import ReportConfig, ReportOptions
from permafrost_report.store_sheet import show_records
from tests.support.runs import PAD_CROP, TRAINER, distill_config, evaluate_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute, report

CUBE = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).T
"""Three patterns of 0 and 1 that do not correlate, [3, 8]."""


def mixed(*directions):
    """Features [2, C, 2, 2] in which the patterns have these directions and falling sizes."""
    return torch.einsum(
        "pnhw,pc->nchw",
        CUBE.reshape(3, 2, 2, 2),
        torch.diag(torch.tensor([9.0, 3, 1])) @ torch.tensor(directions),
    )


def test_three_directions_are_red_green_and_blue_whatever_is_added():
    features = mixed([0, 0, 1.0, 0], [-1, 0, 0, 0], [0, 0.8, 0, -0.6])

    colors = feature_colors(features)

    red, green, blue = (255 * CUBE).byte()
    expected = torch.stack([red, 255 - green, blue], dim=1)  # the largest entry is positive
    assert torch.equal(colors.reshape(8, 3), expected)
    assert torch.equal(feature_colors(features + torch.arange(4.0).view(4, 1, 1)), colors)
    assert not torch.equal(feature_colors(mixed(*torch.eye(3, 4).tolist())), colors)


def test_what_does_not_vary_has_no_color():
    one = mixed([0, 0, 1.0, 0], [0.0] * 4, [0.0] * 4)

    assert feature_colors(torch.full((2, 5, 2, 2), 3.3)).eq(0).all()
    for features in (one, one[:, 2:3]):
        assert feature_colors(features).amax(dim=(0, 1, 2)).tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("more", "pictures"), [(["maps", "features"], 3), (["features"], 2), ([], 1)]
)
def test_a_pass_with_features_is_shown_in_colors(
    tmp_path, monkeypatch, tiny_teacher, more, pictures
):
    monkeypatch.chdir(tmp_path)
    options = PassOptions(batch_size=8, outputs=("logits", *more))
    config = precompute_config(tmp_path / "store", tiny_teacher, annotate=options)
    precompute.run(config)
    frozen = Frozen(Store(tmp_path / "store"), config)

    sheet = show_records(frozen.store, "train", records=4)
    trained = distill_config(frozen, method=KDConfig(tau=4.0))
    distill.run(replace(trained, trainer=replace(TRAINER, epochs=1)), on_epoch=lambda *_: None)
    evaluate.run(replace(evaluate_config(frozen), evaluators=("accuracy",)))
    shown = ReportOptions(contact_records=0, cases=0)
    page = report.run(ReportConfig(store=trained.store, augment=PAD_CROP, report=shown, run="one"))

    assert len([axis for axis in sheet.figure.axes if axis.images]) == 4 * pictures
    html = Path(page.html).read_text()
    assert ("colors" in sheet.facts) == ('id="features"' in html) == ("features" in more)
    tensors = load_written(RUNS / "one" / "evaluate", PICTURES_NAME)
    grids = [tensor.shape for name, tensor in tensors.items() if "features" in name]
    assert grids == [(4, 4, 4, 3)] * (2 * ("features" in more))
