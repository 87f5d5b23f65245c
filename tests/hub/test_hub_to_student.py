"""The page's commands from a hub id to a student, with small networks under these ids in the local cache."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.paths import ROOT
from tests.support.processes import environment

transformers = pytest.importorskip("transformers", reason="run make test-hub")

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
VISION |= {"intermediate_size": 48, "patch_size": 8}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, name, save):
    """Save files to the place in which the library's cache has a commit of a hub id."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    save(folder / "snapshots" / COMMIT)


def save_clip(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "a", "photo", "of", "cat", "dog"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=8
    ).save_pretrained(folder)
    texts = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts |= {"intermediate_size": 48, "vocab_size": len(words), "max_position_embeddings": 8}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=texts | {"eos_token_id": 1})
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": 32}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)


def save_dinov2(folder):
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": 32}
    transformers.BitImageProcessor(**size).save_pretrained(folder)


def test_the_commands_of_the_page_lead_from_a_hub_id_to_a_student(tmp_path):
    cached(tmp_path / "cache", "openai/clip-vit-base-patch32", save_clip)
    cached(tmp_path / "cache", "facebook/dinov2-base", save_dinov2)
    rng = np.random.default_rng(0)
    for split, name, number in [
        (s, c, n) for s in ("train", "test") for c in ("cat", "dog") for n in range(6)
    ]:
        path = tmp_path / "pets" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
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
        line += " store.image_size=40 executor=serial" if " precompute " in line else ""
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
