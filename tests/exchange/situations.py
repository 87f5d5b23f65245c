"""Targets as people bring them: sound ones in many forms, and ones that are wrong in a way that is known here.

    python -m tests.exchange.situations            prints a line per situation, and the counts
    python -m tests.exchange.situations --write    writes the counts to situations.json, from which the page is made

The teacher is a small network of ten shapes in ten colors, trained here, whose logits and maps are computed without
this project. `cause` is what a passport should name, None for sound targets, "unknown" where no cause that a passport
looks for explains them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from permafrost_exchange import passport
from permafrost_exchange.target_comparison import closest, distance_of
from permafrost_exchange.target_reader import TargetError
from tests.support.exchange import run_ingest, run_precompute

COUNTS = Path(__file__).parent / "situations.json"
CLASSES = 10
RECORDS = 160
SIDE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACTORY = """
from torch import nn


def build(classes):
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes),
    )
"""


def draw_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images u8 [n, 32, 32, 3] of shapes, and their classes."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, labels = [], random.integers(0, CLASSES, count)
    for label in labels:
        coarse = random.integers(0, 256, (6, 6, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), 2)).astype(float)
        cy, cx, size = random.integers(7, 25), random.integers(7, 25), random.integers(4, 9)
        dy, dx = y - cy, x - cx
        shape = (
            np.hypot(dy, dx) < size,
            np.maximum(abs(dy), abs(dx)) < size,
            (abs(dy) < size) & (abs(dx) < size / 3),
            (abs(dx) < size) & (abs(dy) < size / 3),
            abs(dy) + abs(dx) < size,
            (dy > -size) & (dy < size) & (abs(dx) < (dy + size) / 2),
            (np.hypot(dy, dx) < size) & (np.hypot(dy, dx) > size / 2),
            (abs(dy) < size / 3) | (abs(dx) < size / 3),
            (dy + dx) % 6 < 2,
            (abs(dx) < size) & (dy % 5 < 2) & (abs(dy) < size),
        )[label]
        color = random.integers(0, 256, 3) * 0.5 + np.eye(3)[label % 3] * 120
        image[shape] = 0.35 * image[shape] + 0.65 * color
        image += random.normal(0, 8, image.shape)
        images.append(image.clip(0, 255))
    return np.stack(images).astype(np.uint8), labels


def train_network(seed: int = 0, steps: int = 250) -> nn.Sequential:
    """Train the network of FACTORY."""
    space: dict = {}
    exec(FACTORY, space)
    torch.manual_seed(seed)
    network = space["build"](CLASSES)
    images, labels = draw_images(1500, seed + 100)
    pixels, targets = as_pixels(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(pixels), (64,), generator=generator)
        loss = F.cross_entropy(network(normalized(pixels[rows])), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def as_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def normalized(pixels: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def cropped(pixels: torch.Tensor, fraction: float) -> torch.Tensor:
    """Sample the square in the middle."""
    theta = torch.tensor([[fraction, 0, 0], [0, fraction, 0]]).expand(len(pixels), 2, 3)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def resized(pixels: torch.Tensor, side: int, mode: str = "bilinear", antialias: bool = True):
    return F.interpolate(pixels, (side, side), mode=mode, antialias=antialias)


@torch.no_grad()
def outputs_of(network: nn.Sequential, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    """Compute logits, pooled features, and the map of the largest logit before and after its ReLU."""
    features = network[:9](inputs)
    logits = network[9:](features)
    top = logits.argmax(dim=1)
    maps = torch.einsum("nc,nchw->nhw", network[11].weight[top], features)
    return {
        "logits": logits.numpy(),
        "pooled": features.mean(dim=(2, 3)).numpy(),
        "whole_map": maps.numpy()[:, None, None],
        "map": maps.relu().numpy()[:, None, None],
        "target_class": top.numpy()[:, None].astype(np.int32),
    }


@dataclass
class Situation:
    """Targets of all records, the options that they are brought with, and what is wrong with them."""

    name: str
    cause: str | None
    arrays: dict[str, np.ndarray]
    words: tuple[str, ...] = ("format.frame=full",)
    says: str = ""
    """Text that the cause must have."""
    keys: np.ndarray | None = field(default=None, repr=False)
    """Records of the rows; None for all in their order."""


class Bench:
    """The store, the teacher and its targets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images, _ = draw_images(RECORDS, 7)
        self.images = images
        for number, image in enumerate(images):
            path = folder / f"images/train/{number % 4}/{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        self.keys = np.array([f"train%2F{n % 4}%2F{n:04d}%2Epng" for n in range(RECORDS)])
        words = (f"data.path={folder / 'images'}", "store.image_size=32", "store.shard_size=50")
        run_precompute(folder / "store", "data=image_folder", *words, "teacher=none")
        self.network = train_network()
        (folder / "factory.py").write_text(FACTORY)
        torch.save(self.network.state_dict(), folder / "weights.pt")

    @cached_property
    def pixels(self) -> torch.Tensor:
        return as_pixels(self.images)

    def outputs(self, pixels: torch.Tensor | None = None, network=None, **statistics):
        inputs = normalized(self.pixels if pixels is None else pixels, **statistics)
        return outputs_of(network or self.network, inputs)

    @property
    def teacher(self) -> tuple[str, ...]:
        return (
            *("teacher=module", f"teacher.factory={self.folder / 'factory.py'}:build"),
            *(f"teacher.weights={self.folder / 'weights.pt'}", "teacher.layer='8'"),
            f"teacher.mean={list(MEAN)}".replace(" ", ""),
            f"teacher.std={list(STD)}".replace(" ", ""),
        )

    def verdict(self, situation: Situation, *words: str) -> tuple[str, str]:
        """Bring the targets; return the kind of cause that the passport names, "agrees" or "unknown", and its text."""
        path = self.folder / "targets.npz"
        keys = self.keys if situation.keys is None else self.keys[situation.keys]
        np.savez(path, keys=keys, **situation.arrays)
        results = []

        def compare(*arguments, **options):
            results.append(compared(*arguments, **options))
            return results[-1]

        compared = passport._compare
        explainer = ("format.explainer=gradcam",) if "map" in situation.arrays else ()
        text = ""
        with mock.patch.object(passport, "_compare", compare):
            try:
                run_ingest(
                    self.folder / "store",
                    *(f"path={path}", "missing=" + str(self.folder / "missing.txt")),
                    *(*explainer, *situation.words, *self.teacher, *words),
                )
            except TargetError as error:
                text = str(error)
                if not results:
                    raise
        made, causes, _ = results[0]
        if causes:
            return causes[0].kind, causes[0].text
        agrees = distance_of(made.agreement) < closest(made.agreement)
        cosines = made.agreement.cosine_mean.values()
        return ("agrees" if agrees and min([1, *cosines]) > 0.98 and not text else "unknown"), text


# ---- situations ----------------------------------------------------------------------------------


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().float().numpy()


PRECISIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda values: values,
    "float16": lambda values: values.astype(np.float16),
    "bfloat16": bfloat16,
}


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return torch.from_numpy(logits / temperature).double().softmax(dim=1).float().numpy()


def forms_of(logits: np.ndarray, random: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Return the forms in which logits are brought."""
    offset = random.normal(0, 5, (len(logits), 1)).astype(np.float32)
    return {
        "logits": {"logits": logits},
        "shifted logits": {"logits": logits + offset},
        "log-probabilities": {"logits": np.log(softmax(logits))},
        "probabilities": {"probabilities": softmax(logits)},
    }


def with_maps(outputs: dict[str, np.ndarray], **arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {"map": outputs["map"], "target_class": outputs["target_class"]} | arrays


def sound(bench: Bench) -> Iterator[Situation]:
    random = np.random.default_rng(1)
    for fraction in (None, 0.875, 0.6):
        pixels = bench.pixels if fraction is None else cropped(bench.pixels, fraction)
        words = ("format.frame=full",)
        if fraction is not None:
            words = ("format.frame=center_crop", f"format.crop_fraction={fraction}")
        outputs = bench.outputs(pixels)
        for precision, rounded in PRECISIONS.items():
            for form, arrays in forms_of(outputs["logits"], random).items():
                stored = {name: rounded(array) for name, array in arrays.items()}
                name = f"{form}, {precision}, {'whole image' if fraction is None else fraction}"
                yield Situation(name, None, stored, words)
                maps = rounded(outputs["map"] * random.uniform(0.1, 9, (RECORDS, 1, 1, 1, 1)))
                arrays = with_maps(outputs, **stored, map=maps.astype(np.float32))
                yield Situation(f"{name}, maps", None, arrays, words)
    outputs = bench.outputs()
    order = random.permutation(RECORDS)
    shuffled = with_maps({n: a[order] for n, a in outputs.items()}, logits=outputs["logits"][order])
    yield Situation("another order of the rows, with keys", None, shuffled, keys=order)
    part = order[:70]
    yield Situation("some records", None, {"logits": outputs["logits"][part]}, keys=part)
    yield Situation("embeddings", None, {"pooled": outputs["pooled"]})
    noisy = outputs["logits"] + random.normal(0, 0.005, outputs["logits"].shape).astype("f4")
    yield Situation("rounding of other kernels", None, {"logits": noisy})
    large = bench.outputs(F.interpolate(bench.pixels, (48, 48), mode="bilinear"))
    words = ("format.frame=full", "teacher.input_size=48")
    yield Situation("inputs of 48 pixels, as stated", None, {"logits": large["logits"]}, words)


def temperatures(bench: Bench) -> Iterator[Situation]:
    outputs = bench.outputs()
    for temperature in (0.5, 1.5, 2.0, 3.0, 4.0, 10.0, 20.0):
        says = f"at temperature {temperature:.3g}"
        for name, arrays in {
            "logits": {"logits": outputs["logits"] / temperature},
            "probabilities": {"probabilities": softmax(outputs["logits"], temperature)},
        }.items():
            title = f"{name} at temperature {temperature}"
            if not (name == "probabilities" and temperature < 1):
                yield Situation(title, "temperature", with_maps(outputs, **arrays), says=says)


def orders(bench: Bench) -> Iterator[Situation]:
    outputs, random = bench.outputs(), np.random.default_rng(2)
    found = {f"shifted by {n}": np.roll(np.arange(CLASSES), -n) for n in (1, 2, 9)}
    found |= {
        "reversed": np.arange(CLASSES)[::-1],
        "by name": np.array([0, 1, 9, 2, 3, 4, 5, 6, 7, 8]),
    }
    for number in range(12):
        order = np.arange(CLASSES)
        one, other = random.choice(CLASSES, 2, replace=False)
        order[[one, other]] = other, one
        found[f"swapped {one} and {other} ({number})"] = order
    found |= {f"permuted {number}": random.permutation(CLASSES) for number in range(5)}
    for name, order in found.items():
        inverse = np.argsort(order)
        explained = inverse[outputs["target_class"]].astype(np.int32)
        arrays = with_maps(outputs, logits=outputs["logits"][:, order], target_class=explained)
        moved = np.flatnonzero(order != np.arange(CLASSES))
        says = f"class {moved[0]} is the teacher's {order[moved[0]]}"
        yield Situation(f"classes {name}", "classes", arrays, says=says)
    order = np.roll(np.arange(CLASSES), -3)
    arrays = {"logits": outputs["logits"][:, order] / 4}
    name = "classes shifted by 3 at temperature 4"
    yield Situation(name, "classes", arrays, says="temperature 4")


def other_rows(bench: Bench) -> Iterator[Situation]:
    outputs, random = bench.outputs(), np.random.default_rng(3)
    for count in (1, 2, 5, 20, 60):
        for seed in range(2):
            order = np.arange(RECORDS)
            odd = random.choice(RECORDS, count, replace=False)
            order[odd] = (odd + 1 + random.integers(0, RECORDS - 1, count)) % RECORDS
            logits = outputs["logits"][order]
            arrays = {"logits": logits}
            if seed:
                arrays = with_maps({n: a[order] for n, a in outputs.items()}, logits=logits)
            name = f"{count} rows of other records ({seed})"
            yield Situation(name, "rows", arrays, says="rows are not")
    for name, order in {
        "shifted by one": np.roll(np.arange(RECORDS), 1),
        "shuffled": random.permutation(RECORDS),
    }.items():
        logits = outputs["logits"][order]
        for title, arrays in {
            f"rows {name}": {"logits": logits},
            f"rows {name}, probabilities": {"probabilities": softmax(logits)},
            f"embeddings {name}": {"pooled": outputs["pooled"][order]},
        }.items():
            yield Situation(title, "rows", arrays, says=" has those of ")


def other_inputs(bench: Bench) -> Iterator[Situation]:
    pixels = bench.pixels

    def made(name, inputs, says, words=("format.frame=full",), **statistics):
        outputs = bench.outputs(inputs, **statistics)
        arrays = with_maps(outputs, logits=outputs["logits"])
        return Situation(name, "preprocessing", arrays, words, says)

    for fraction in (0.9, 0.875, 0.8, 0.75, 0.9375, 0.6, 0.5, 0.966):
        says = f"crop_fraction={fraction:g}"
        yield made(f"crop {fraction}, said to be full", cropped(pixels, fraction), says)
    declared = ("format.frame=center_crop", "format.crop_fraction=0.875")
    yield made("full, said to be a crop", pixels, "format.frame=", declared)
    for fraction in (0.7, 0.95):
        says = f"crop_fraction={fraction:g}"
        yield made(f"crop {fraction}, said to be .875", cropped(pixels, fraction), says, declared)
    yield made("BGR", pixels.flip(1), "BGR")
    yield made("mirrored images", pixels.flip(3), "mirrored")
    yield made("images upside down", pixels.flip(2), "upside down")
    yield made("not normalized", pixels, "0 and 1", mean=(0.0,) * 3, std=(1.0,) * 3)
    yield made("normalized by 0.5", pixels, "0.5 and 0.5", mean=(0.5,) * 3, std=(0.5,) * 3)
    cifar = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    yield made("normalized by CIFAR-10's", pixels, "CIFAR-10's", **cifar)
    yield made("pixels of 0 to 255", pixels * 255, "from 0 to 255")
    for side in (16, 24, 48, 64):
        for mode, antialias in (("bilinear", True), ("bicubic", False)):
            small = resized(resized(pixels, side, mode, antialias), SIDE, mode, antialias)
            name = f"resized to {side} before ({mode})"
            yield made(name, small.clamp(0, 1), f"resized to {side}")
    for side in (24, 48, 64):
        large = F.interpolate(pixels, (side, side), mode="bilinear", antialias=False)
        arrays, size = {"logits": bench.outputs(large)["logits"]}, f"{side} pixels"
        yield Situation(f"inputs of {size}", "preprocessing", arrays, says=size)
    arrays = {"pooled": bench.outputs(cropped(pixels, 0.8))["pooled"]}
    name = "embeddings of a crop, said to be full"
    yield Situation(name, "preprocessing", arrays, says="=0.8")


def other_maps(bench: Bench) -> Iterator[Situation]:
    outputs = bench.outputs()
    maps = outputs["map"]
    for name, turned in {
        "transposed": maps.swapaxes(-1, -2),
        "mirrored": maps[..., ::-1],
        "upside down": maps[..., ::-1, :],
        "turned by 180": maps[..., ::-1, ::-1],
        "turned by 90": np.rot90(maps, 1, (-2, -1)),
        "turned by 270": np.rot90(maps, 3, (-2, -1)),
        "other diagonal": maps[..., ::-1, ::-1].swapaxes(-1, -2),
        "negative": -maps,
    }.items():
        for form in ({"logits": outputs["logits"]}, {"logits": outputs["logits"] / 4}):
            at = "" if form["logits"] is outputs["logits"] else " at temperature 4"
            kind, says = ("temperature", "temperature 4") if at else ("maps", name)
            arrays = with_maps(outputs, **form, map=np.ascontiguousarray(turned))
            yield Situation(f"maps {name}{at}", kind, arrays, says=says)
    arrays = with_maps(outputs, logits=outputs["logits"], map=outputs["whole_map"])
    yield Situation("maps with negative values", "maps", arrays, says="negative values")
    top = outputs["target_class"][:, 0]
    for seed in range(3):  # maps of other records of the same class
        random, order = np.random.default_rng(seed), np.arange(RECORDS)
        for number in range(CLASSES):
            rows = np.flatnonzero(top == number)
            order[rows] = random.permutation(rows)
        arrays = with_maps(outputs, logits=outputs["logits"], map=maps[order])
        yield Situation(f"maps of other records ({seed})", "maps", arrays, says="rows are not")


def noises(bench: Bench) -> Iterator[Situation]:
    outputs = bench.outputs()
    for size in (0.5, 1.0, 2.0):
        for seed in range(2):
            random = np.random.default_rng(seed)
            logits = outputs["logits"] + random.normal(0, size, outputs["logits"].shape)
            arrays = {"logits": logits.astype("f4")}
            yield Situation(f"noise of {size} ({seed})", "unknown", arrays)


def unexplained(bench: Bench) -> Iterator[Situation]:
    outputs, pixels = bench.outputs(), bench.pixels

    def made(name, result):
        return Situation(name, "unknown", with_maps(result, logits=result["logits"]))

    for seed in (1, 2):
        yield made(f"another network ({seed})", bench.outputs(network=train_network(seed)))
    yield made("an earlier checkpoint", bench.outputs(network=train_network(0, 120)))
    space: dict = {}
    exec(FACTORY, space)
    for share in (0.05, 0.1, 0.3):
        torch.manual_seed(0)
        other = space["build"](CLASSES).eval()
        state = {
            n: v + share * v.std() * torch.randn_like(v) if v.ndim > 1 else v
            for n, v in bench.network.state_dict().items()
        }
        other.load_state_dict(state)
        yield made(f"weights disturbed by {share}", bench.outputs(network=other))
    for number in (0, 4):
        logits = outputs["logits"].copy()
        logits[:, number] = 0
        yield Situation(f"class {number} set to 0", "unknown", {"logits": logits})
    bias = np.random.default_rng(4).normal(0, 1, CLASSES).astype("f4")
    yield Situation("logits adjusted by class", "unknown", {"logits": outputs["logits"] + bias})
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    yield made("blurred images", bench.outputs(blurred))
    yield made("higher contrast", bench.outputs(((pixels - 0.5) * 1.4 + 0.5).clamp(0, 1)))
    yield made("gray images", bench.outputs(pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    random = np.random.default_rng(5)
    numbers = random.normal(0, 4, (RECORDS, CLASSES)).astype("f4")
    yield Situation("random numbers", "unknown", {"logits": numbers})
    constant = np.repeat(outputs["logits"][:1], RECORDS, axis=0)
    constant[1::2] += random.normal(0, 0.5, (RECORDS // 2, CLASSES))
    yield Situation("nearly the same for all", "unknown", {"logits": constant})
    mixed = outputs["logits"].copy()
    mixed[::2] /= 3
    yield Situation("two temperatures", "unknown", {"logits": mixed})
    flat = np.clip(outputs["logits"], -2, 2)
    yield Situation("clipped logits", "unknown", {"logits": flat})
    both = outputs["logits"][random.permutation(RECORDS)] + random.normal(0, 1, (RECORDS, CLASSES))
    yield Situation("noise on rows of other records", "unknown", {"logits": both.astype("f4")})


GROUPS = (sound, temperatures, orders, other_rows, other_inputs, other_maps, noises, unexplained)


def situations(bench: Bench) -> Iterator[Situation]:
    """Iterate over all situations."""
    for group in GROUPS:
        yield from group(bench)


def judge(situation: Situation, kind: str, text: str) -> str:
    """Return "right", "false alarm", "miss" or "wrong"."""
    if situation.cause is None:
        return "right" if kind == "agrees" else "false alarm"
    if kind == situation.cause and (kind == "unknown" or situation.says in text):
        return "right"
    return "miss" if kind in ("unknown", "agrees") else "wrong"


def main() -> None:
    """Judge all situations."""
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for situation in situations(bench):
            kind, text = bench.verdict(situation)
            verdict = judge(situation, kind, text)
            counts.setdefault(str(situation.cause), Counter())[verdict] += 1
            if "--write" not in sys.argv:
                print(f"{verdict:12}{situation.name}: {kind} {text[:110]}", flush=True)
    rows = {cause: dict(each) for cause, each in counts.items()}
    print(json.dumps(rows), sum(sum(each.values()) for each in rows.values()))
    if "--write" in sys.argv:
        COUNTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
