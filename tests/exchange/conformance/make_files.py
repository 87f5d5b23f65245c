"""Write the files of this folder with the code of the tools themselves, and note what their readers yield.

    python -m tests.exchange.conformance.make_files <folder with a checkout of each repository>

Each format has a zip with the files, and an .npz with what that code's reader feeds to a student from them. Nothing
of a checkout is copied. The commits, and the places of each writer and reader:

    fkd            szq0214/FKD afd5294
        writer     FKD_SLG/generate_soft_label.py:257-317 and :371, FKD_SLG/utils.py:12-82
        reader     utils_FKD.py:28-41 (crop), :77-115 (data set), :118-157 (labels)
    imagenet_plus  apple/ml-dr a21113c
        writer     reinforce.py:225-280 and :285-347, dr/transforms.py (Compose.compress), dr/utils.py:12
        reader     dr/data.py:28-115, dr/transforms.py (Compose.decompress, reapply), dr/utils.py:18
    datacompdr     apple/ml-mobileclip-dr 418551d
        writer     scripts/gen.py:398-407, src/raygen/datasetio.py:562-640
        reader     src/raygen/datasetio.py:148-193, src/raygen/dr/transforms.py (Compose.reapply)
    tinyvit        microsoft/Cream 4a13c40, TinyViT
        writer     save_logits.py:134-158, data/augmentation/manager.py:27-58, data/sampler.py
        reader     data/augmentation/dataset_wrapper.py:44-63, main.py:320-328
    relabel        naver-ai/relabel_imagenet 3d4824f
        writer     not published
        reader     utils/relabel_functions.py:14-40, utils/data_loader.py:88-107
    theia          bdaiinstitute/theia a4d5aae, src/theia
        writer     scripts/preprocessing/feature_extraction.py:257-268
        reader     dataset/data_utils.py:118-134
    e2kd           m-parchami/GoodTeachersExplain a1b7bb5, bcos
        writer     not published
        reader     data/datasets.py:60-117

Files of the two without a published writer were made as their reader reads them. Theia's is a dozen lines around
webdataset's and safetensors' own writers, which are called here in the same way.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

FILES = Path(__file__).parent / "files"
CLASSES = 12
SIDE = 32
"""Side of the views in pixels."""
VIEWS = 3
CELLS = 15
"""Side of the label maps of ReLabel in cells; their reader has 1,000 classes."""
RELABEL_CLASSES = 1000


# ---- photographs and a teacher -------------------------------------------------------------------


def write_photographs(folder: Path) -> list[Path]:
    """Write a JPEG of each EXIF orientation, of different proportions, in two classes."""
    random = np.random.default_rng(0)
    paths = []
    for orientation in range(1, 9):
        height, width = ((60, 84), (84, 60), (72, 72), (64, 96))[orientation % 4]
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
        pixels[8:20, 6:30] = random.integers(0, 256, 3)
        pixels[height - 16 : height - 6, width // 2 :] = random.integers(0, 256, 3)
        path = folder / f"train/n{(orientation - 1) // 4}/photo_{orientation}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(path, quality=88, exif=exif)
        paths.append(path)
    return paths


class Teacher(nn.Module):
    """A network whose probabilities differ from view to view."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(CLASSES, 48, generator=generator)

    def forward(self, images: torch.Tensor, return_prob: bool = False) -> torch.Tensor:
        logits = 1.5 * F.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight.T
        return logits.softmax(dim=1) if return_prob else logits


# ---- modules of the checkouts --------------------------------------------------------------------


@contextmanager
def modules_of(folder: Path, *stubs: str) -> Iterator[None]:
    """Import from a folder, with empty modules in place of some that its code imports and these files do not need."""
    before = dict(sys.modules)
    sys.path.insert(0, str(folder))
    for name in stubs:
        module = types.ModuleType(name)
        module.__getattr__ = lambda attribute: mock.MagicMock()  # type: ignore[method-assign]
        sys.modules[name] = module
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - before.keys() | set(stubs):
            del sys.modules[name]
        sys.modules |= before


def module_at(path: Path) -> types.ModuleType:
    """Import one file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(name: str, folder: Path, **arrays: np.ndarray) -> None:
    """Write the files of a folder as a zip, and what the tool's reader yields as an .npz."""
    with zipfile.ZipFile(FILES / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), (2020, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, path.read_bytes())
    if arrays:
        np.savez_compressed(FILES / f"{name}.npz", **arrays)


def unpack(name: str, target: Path) -> Path:
    """Extract the files of a format into a folder of its name, and return that folder."""
    with zipfile.ZipFile(FILES / f"{name}.zip") as file:
        file.extractall(target / name)
    return target / name


def as_u8(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().clamp(0, 255).to(torch.uint8).numpy()


# ---- formats -------------------------------------------------------------------------------------


FKD_KINDS = {
    # what label_quantization and Recover_soft_label call it, temperature, and the option use_fp16
    "fkd_k5": ("marginal_smoothing_k5", "marginal_smoothing_k5", 1.0, False),
    "fkd_k10": ("marginal_smoothing_k10", "marginal_smoothing_k10", 1.0, False),
    "fkd_renorm": ("marginal_renorm_k5", "marginal_renorm", 1.0, False),
    "fkd_smoothing": ("smoothing", "smoothing", 1.0, False),
    "fkd_hard": ("hard", "hard", 1.0, False),
    "fkd_fp16": ("marginal_smoothing_k5", "marginal_smoothing_k5", 4.0, True),
}


def make_fkd(checkouts: Path, photographs: Path) -> None:
    code = checkouts / "FKD/FKD"
    for name, (written, read, temperature, halves) in FKD_KINDS.items():
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as target, modules_of(code / "FKD_SLG"):
            generate = importlib.import_module("generate_soft_label")
            dataset = generate.ImageFolder_FKD_GSL(
                num_crops=VIEWS,
                save_path=target,
                reference_path=None,
                root=str(photographs / "train"),
                transform=generate.ComposeWithCoords(
                    transforms=[
                        generate.RandomResizedCropWithCoords(
                            size=SIDE,
                            scale=(0.08, 1.0),
                            interpolation=transforms.InterpolationMode.BICUBIC,
                        ),
                        generate.RandomHorizontalFlipWithRes(),
                        transforms.ToTensor(),
                    ]
                ),
            )
            options = types.SimpleNamespace(
                save_path=target,
                num_crops=VIEWS,
                num_seg=1 if halves else VIEWS,
                gpu=None,
                temp=temperature,
                label_type=written,
                use_fp16=halves,
            )
            loader = torch.utils.data.DataLoader(dataset, batch_size=4)
            generate.generate_soft_labels(loader, Teacher(), options)
            labels = Path(target, photographs.name)
            views, targets = read_fkd(code, photographs, labels, read)
            kept = {"views": views} if name == "fkd_k5" else {}
            pack(name, labels, targets=targets, **kept)


def read_fkd(
    code: Path, photographs: Path, labels: Path, label_type: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and targets of all views in their order, by their data set."""
    with modules_of(code):
        utils = importlib.import_module("utils_FKD")
        dataset = utils.ImageFolder_FKD(
            num_crops=VIEWS,
            softlabel_path=str(labels),
            root=str(photographs / "train"),
            transform=utils.Compose_FKD(
                transforms=[
                    utils.RandomResizedCrop_FKD(size=SIDE, interpolation="bilinear"),
                    utils.RandomHorizontalFlip_FKD(),
                    transforms.ToTensor(),
                ]
            ),
        )
        load = torch.load

        def numpy_load(*args, **kwargs):
            return load(*args, **kwargs, weights_only=False)

        views, targets = [], []
        with (
            mock.patch.object(utils.torch, "load", numpy_load),
            mock.patch.object(utils.torch, "randperm", lambda n: torch.arange(n)),
        ):
            for number in range(len(dataset)):
                images, _, soft = dataset[number]
                views.append(torch.stack(images))
                stacked = torch.from_numpy(np.stack(soft))
                if label_type != "hard":
                    stacked = stacked.float()
                targets.append(utils.Recover_soft_label(stacked, label_type, CLASSES))
    return as_u8(torch.stack(views)), torch.stack(targets).numpy().astype("float32")


PLAIN = {
    "uint8": {"enable": True},
    "random_resized_crop": {"enable": True, "size": SIDE},
    "random_horizontal_flip": {"enable": True, "p": 0.5},
    "to_tensor": {"enable": True},
}
AFTER_CROP = {
    "random_horizontal_flip": {"enable": True, "p": 0.5},
    "rand_augment": {"enable": True, "p": 1.0},
    "to_tensor": {"enable": True},
    "random_erase": {"enable": True, "p": 0.5},
}
IMAGENET_PLUS = {
    # image_augmentation, compress; of the committed configurations, without the normalization
    "imagenet_plus": (PLAIN, True),
    "imagenet_plus_randaug": (PLAIN | AFTER_CROP, True),
    "imagenet_plus_mappings": (PLAIN | AFTER_CROP, False),
    "imagenet_plus_mixing": (PLAIN | {"cutmix": {"alpha": 1.0, "p": 0.5}}, True),
    "cifar100_plus": (
        {
            "uint8": {"enable": True},
            "resize": {
                "size": [SIDE, SIDE]
            },  # their writer stops at the number of the configuration
            "random_crop": {"size": SIDE, "padding": 4},
            **AFTER_CROP,
        },
        True,
    ),
    "flowers102_plus": (
        {
            "uint8": {"enable": True},
            "random_resize_crop": {"enable": True, "size": SIDE},
            **AFTER_CROP,
        },
        True,
    ),
}


def make_imagenet_plus(checkouts: Path, photographs: Path) -> None:
    code = checkouts / "ml-dr"
    for name, (augmentation, compress) in IMAGENET_PLUS.items():
        torch.manual_seed(2)
        np.random.seed(2)
        with (
            tempfile.TemporaryDirectory() as target,
            modules_of(code, "internal", "internal.hooks", "internal.data", "models"),
        ):
            program = importlib.import_module("reinforce")
            recipes, data = program.T_dr, importlib.import_module("dr.data")
            import random

            random.seed(2)
            config = {
                "gpu": None,
                "print_freq": 1000,
                "reinforce": {
                    "num_samples": VIEWS,
                    "topk": 5,
                    "compress": compress,
                    "joblib": False,
                    "image_augmentation": augmentation,
                },
            }
            before = recipes.compose_from_config(recipes.before_collate_config(augmentation))
            images = ImageFolder(str(photographs / "train"))
            loader = torch.utils.data.DataLoader(
                data.IndexedDataset(data.DatasetWithParameters(images, before, VIEWS)),
                batch_size=1 if name == "flowers102_plus" else 4,
            )
            folder = Path(target)
            with (
                mock.patch.object(program.os.path, "join", partial(_inside, folder)),
                mock.patch.object(program.time, "sleep"),
            ):
                program.reinforce(loader, Teacher(), config)
            torch.save(config, folder / "config.pth.tar")
            if name == "imagenet_plus_mixing":
                pack(name, folder)
                continue
            views, targets = read_imagenet_plus(recipes, data, photographs, folder, augmentation)
            if name == "flowers102_plus":  # views of the whole image, of its own size
                views = [F.interpolate(each.float(), (SIDE, SIDE), mode="area") for each in views]
            kept = {} if name == "imagenet_plus_mappings" else {"views": as_u8(torch.stack(views))}
            pack(name, folder, targets=targets, **kept)


def _inside(folder: Path, *parts: object) -> str:
    """Join a path as os.path.join, with the folder in place of the one that their program names."""
    text = "/".join(map(str, parts))
    return text.replace("/mnt/reinforced_data", str(folder))


def read_imagenet_plus(
    recipes, data, photographs: Path, folder: Path, augmentation: dict
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Return pixels and targets of all views in their order, by their data set."""
    dataset = data.ReinforcedDataset(
        ImageFolder(str(photographs / "train")), str(folder), {"densify": "smooth"}, CLASSES
    )
    load, views, targets = torch.load, [], []

    def numpy_load(*args, **kwargs):
        return load(*args, **kwargs, weights_only=False)

    with mock.patch.object(data.torch, "load", numpy_load):
        for number in range(len(dataset)):
            rows = []
            for view in range(VIEWS):
                with mock.patch.object(
                    data.random, "randint", lambda low, high, v=view: v if high else 0
                ):
                    rows.append(dataset[number])
            views.append(torch.stack([image for image, _ in rows]))
            targets.append(torch.stack([target for _, target in rows]))
    return views, torch.stack(targets).numpy().astype("float32")


DATACOMPDR = {
    "random_resized_crop": {"interpolation": "bicubic", "size": SIDE},
    "rand_augment": {"enable": True, "p": 1.0},
    "to_tensor": {"enable": True},
}


def make_datacompdr(checkouts: Path, photographs: Path) -> None:
    import hashlib

    code = checkouts / "ml-mobileclip-dr/src"
    missing = ("jsonlines", "pybase64", "zstandard", "pympler")
    missing += ("raygen.cloud_common.storage_utils",)
    for name, halves in (("datacompdr", False), ("datacompdr_bfloat16", True)):
        torch.manual_seed(4)
        with tempfile.TemporaryDirectory() as target, modules_of(code, *missing):
            recipes = importlib.import_module("raygen.dr.transforms")
            writers = importlib.import_module("raygen.datasetio")
            compose = recipes.compose_from_config(DATACOMPDR)
            items, views = [], []
            for number, path in enumerate(sorted((photographs / "train").rglob("*.jpg"))):
                image = Image.open(io.BytesIO(path.read_bytes())).convert("RGBA").convert("RGB")
                params = [compose.compress(compose(image)[1]) for _ in range(VIEWS)]
                again = [compose.reapply(image, compose.decompress(each))[0] for each in params]
                views.append(torch.stack(again))
                embeddings = F.adaptive_avg_pool2d(torch.stack(again), 2).flatten(1)
                items.append(
                    {
                        "uid": f"{number:032x}",
                        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                        "param_aug": params,
                        "image_embedding": embeddings.numpy(),
                    }
                )
            writer = writers.TarWriter.__new__(writers.TarWriter)
            writer.bfloat16 = halves
            no_image = mock.patch.object(writers, "get_image_bytes", return_value=b"")
            with Path(target, "00000000.tar").open("wb") as file, no_image:
                writer._write_fileobj([dict(item) for item in items], file)
            embeddings = np.stack([item["image_embedding"] for item in items])
            pack(name, Path(target), views=as_u8(torch.stack(views)), targets=embeddings)


TINYVIT_TOP = 5


def make_tinyvit(checkouts: Path, photographs: Path) -> None:
    """Write the probabilities of three ranks, whose sampler repeats a record."""
    code = checkouts / "Cream/TinyViT"
    manager = module_at(code / "data/augmentation/manager.py")
    sampler = module_at(code / "data/sampler.py")
    dataset = ImageFolder(
        str(photographs / "train"),
        transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()]),
    )
    images = torch.stack([image for image, _ in dataset])
    probabilities = Teacher()(images).softmax(dim=1)
    with tempfile.TemporaryDirectory() as target:
        folder = Path(target) / f"logits_top{TINYVIT_TOP}_epoch0"
        for rank in range(3):
            writer = manager._Writer(str(folder), rank)
            values, indices = probabilities.topk(TINYVIT_TOP, dim=-1)
            for number in sampler.MyDistributedSampler(dataset, 3, rank, shuffle=True):
                seed = np.int32(1000 + 10 * rank + number)
                halves = values[number].to(torch.float16).numpy()
                writer.write(
                    str(number),
                    seed.tobytes()
                    + indices[number].to(torch.int16).numpy().tobytes()
                    + halves.tobytes(),
                )
            writer.msg_queue.put(manager._Writer._WORKER_MSG.KILL)
            writer.worker.join()
            writer.worker = None
        reader = manager.TxtManager(str(folder), TINYVIT_TOP * 4 + 4, 0)
        rows = []
        for number in range(len(dataset)):
            data = reader.read(str(number))[4:]
            index = torch.from_numpy(np.frombuffer(data[: 2 * TINYVIT_TOP], np.int16).copy()).long()
            value = torch.from_numpy(
                np.frombuffer(data[2 * TINYVIT_TOP :], np.float16).copy()
            ).float()
            minor = ((1 - value.sum(-1, keepdim=True)) / (CLASSES - TINYVIT_TOP)).repeat(CLASSES)
            rows.append(minor.scatter_(-1, index, value))
        pack("tinyvit", folder, targets=torch.stack(rows).numpy())


def make_relabel(checkouts: Path, photographs: Path) -> None:
    code = checkouts / "relabel_imagenet"
    generator = torch.Generator().manual_seed(5)
    paths = sorted((photographs / "train").rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as target, modules_of(code):
        functions = importlib.import_module("utils.relabel_functions")
        maps = []
        for path in paths:
            scores = (torch.randn(5, CELLS, CELLS, generator=generator) * 32).round() / 8 + 6
            order = scores.sort(dim=0, descending=True).values
            blocks = [torch.randperm(40, generator=generator)[:5] for _ in range(9)]
            coarse = torch.stack(blocks, dim=1).reshape(5, 3, 3)
            classes = coarse.repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)
            maps.append(torch.stack([order, classes.float()]))
            file = Path(target, path.parent.name, f"{path.stem}.pt")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(maps[-1], file)
        batch = torch.stack(maps)
        # Boxes as their RandomResizedCropWithCoords returns them, made ends as their batch function does.
        boxes = relabel_boxes(len(paths))
        with mock.patch.object(torch.Tensor, "cuda", lambda self: self):
            full = functions.get_labelmaps(batch, len(paths))
            ends = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)
            targets = torch.stack(
                [functions.get_relabel(full, ends[:, view], len(paths)) for view in range(VIEWS)],
                dim=1,
            )
        pack("relabel", Path(target), boxes=boxes.numpy(), targets=targets.numpy())


def relabel_boxes(count: int) -> torch.Tensor:
    """Return boxes (top, left, height, width) as fractions of the image, the whole image first."""
    generator = torch.Generator().manual_seed(6)
    sides = 0.05 + 0.9 * torch.rand(count, VIEWS, 2, generator=generator)
    corners = torch.rand(count, VIEWS, 2, generator=generator) * (1 - sides)
    boxes = torch.cat([corners, sides], dim=-1)
    boxes[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes


def make_theia(photographs: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    paths = sorted((photographs / "train").rglob("*.jpg"))
    features = torch.randn(len(paths), 6, 4, 4, generator=generator).bfloat16()
    model = "facebook_dinov2-small"
    with tempfile.TemporaryDirectory() as target:
        folder = Path(target, model)
        folder.mkdir()
        with webdataset.TarWriter(str(folder / "photos_train-000000-train.tar")) as sink:
            for path, embedding in zip(paths, features, strict=True):
                tensors = {"embedding": embedding, "cls_token": embedding[:, 0, 0].contiguous()}
                data = safetensors.torch.save(tensors)
                sink.write({"__key__": path.stem, f"{model}.safetensors": data})
        pack("theia", Path(target), targets=features.float().numpy())


def make_e2kd(photographs: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    count = len(list((photographs / "train").rglob("*.jpg")))
    for name, shape in (("e2kd_gradcam", (1, 7, 7)), ("e2kd_bcos", (6, 14, 14))):
        logits = torch.randn(count, CLASSES, generator=generator) * 3
        maps = torch.rand(count, *shape, generator=generator)
        with tempfile.TemporaryDirectory() as target:
            for number in range(count):
                one = {"ouptut": logits[number], "weight": maps[number].half()}
                if name == "e2kd_gradcam":
                    one = {"output": logits[number][None], "grad_cam": maps[number][None]}
                torch.save(one, Path(target, f"{number}.pt"))
            kept = maps if name == "e2kd_gradcam" else maps.half().float()
            pack(name, Path(target), targets=logits.numpy(), maps=kept.numpy())


def main(checkouts: Path) -> None:
    """Write all files."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder, "photos")
        write_photographs(photographs)
        pack("photographs", photographs)
        make_fkd(checkouts, photographs)
        make_imagenet_plus(checkouts, photographs)
        make_datacompdr(checkouts, photographs)
        make_tinyvit(checkouts, photographs)
        make_relabel(checkouts, photographs)
        make_theia(photographs)
        make_e2kd(photographs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
