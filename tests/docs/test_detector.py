"""Commands and Python of the page on detectors: from unlabeled images to a detector and a segmenter that learn."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

import permafrost
from tests.support.commands import lines_of
from tests.support.pages import blocks_of
from tests.support.paths import ROOT

PAGE = ROOT / "docs/howto/detector.md"
SMALL = {
    "precompute": ["executor=serial", "store.image_size=64"],
    "distill": ["augment.size=64", "trainer.epochs=1", "trainer.batch_size=4"],
}
"""Options of each verb with which its commands end in seconds."""


@pytest.mark.slow
def test_the_page_ends_with_a_detector_and_a_segmenter_whose_losses_fall(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures, targets, masks = [], [], []
    for number in range(6):
        x, y = (int(corner) for corner in np.random.default_rng(number).integers(0, 32, 2))
        picture, mask = torch.full((3, 64, 64), 0.2), torch.zeros(64, 64, dtype=torch.int64)
        picture[number % 3, y : y + 32, x : x + 32] = mask[y : y + 32, x : x + 32] = 1
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(f"{number}.png")
        box = {"boxes": torch.tensor([[x, y, x + 32.0, y + 32.0]]), "labels": torch.tensor([1])}
        for values, value in zip((pictures, targets, masks), (picture, box, mask), strict=True):
            values.append(value)
    Path("images.csv").write_text("path\n" + "".join(f"{number}.png\n" for number in range(6)))
    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), "resnet50.pth")
    for line in lines_of(next(blocks_of(PAGE, "bash")).code):
        _, verb, *words = shlex.split(line)
        getattr(permafrost, verb)(*words, *SMALL[verb])

    names = {"pictures": pictures, "targets": targets, "masks": masks}
    code = [block.code for block in blocks_of(PAGE, "python")]
    for block in code:
        names["history"] = history = []
        small = block.replace("min_size=256", "rpn_post_nms_top_n_train=50, min_size=64")
        exec(small.replace(".step()", ".step(); history.append(loss.item())"), names)
        epoch = len(history) // 5
        assert block is code[0] or np.mean(history[-epoch:]) < np.mean(history[:epoch])
