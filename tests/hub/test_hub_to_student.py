"""The page's commands from a hub id to a student, with small networks under these ids in the local cache."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image

from tests.models.transformers_families import save_family, save_processor
from tests.support.paths import ROOT
from tests.support.processes import environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(folder, name, family, kind, **options):
    """Save a small network to the place in which the library's cache has a commit of a hub id."""
    folder /= f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    save_family(family, folder / "snapshots" / COMMIT)
    save_processor(folder / "snapshots" / COMMIT, kind, **options)


def test_the_commands_of_the_page_lead_from_a_hub_id_to_a_student(tmp_path):
    folder, crop = tmp_path / "cache", {"crop_size": {"height": 64, "width": 64}}
    sides = {"size": {"shortest_edge": 64}, **crop}
    cache(folder, "openai/clip-vit-base-patch32", "CLIP, texts", "CLIP", **sides)
    cache(folder, "facebook/dinov2-base", "DINOv2", "Bit", size={"shortest_edge": 72}, **crop)
    rng = np.random.default_rng(0)
    for split, name, number in [
        (s, c, n) for s in ("train", "test") for c in ("cat", "dog") for n in range(6)
    ]:
        path = tmp_path / "pets" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 96, 3), np.uint8)).save(path)
    page = (
        (ROOT / "docs/howto/networks.md").read_text().partition("## From the hub to a student")[2]
    )
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL).group(1).replace("\\\n", " ")
    env = environment() | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    small = {"augment.size=224": "augment.size=32 trainer.epochs=1 trainer.batch_size=4"}
    for line in block.splitlines():
        for old, new in small.items():
            line = line.replace(old, new)
        line = line.replace("permafrost ", f"{shlex.quote(sys.executable)} -m permafrost ", 1)
        line += " store.image_size=72 executor=serial" if " precompute " in line else ""
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    manifests = {
        path.parent.name.rpartition("-")[0]: json.loads(path.read_text())
        for path in tmp_path.glob("stores/pets/teachers/*/manifest.json")
    }
    assert manifests["clip-vit-base-patch32"]["teacher"]["weights"] == f"pretrained:{COMMIT}"
    fields = {field["name"] for field in manifests["dinov2"]["fields"]}
    assert {"pooled", "features_1", "features_2"} <= fields
    assert (tmp_path / "runs/pets-dinov2/distill/model.safetensors").is_file()
