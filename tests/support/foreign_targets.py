"""Teacher targets as the tools of others publish them, written without their code."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from safetensors.torch import save as safetensors_bytes

# torchvision's order of RandAugment's operations, which ml-dr's compressed recipes refer to.
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness"),
    *("Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
# ml-dr's transforms in the order of its recipes, whatever the order of its configuration.
CROPS = ("resize", "random_crop", "random_resized_crop")
PARAMETRIC = (*CROPS, "random_horizontal_flip", "rand_augment", "random_erase")
PARAMETERLESS = ("uint8", "center_crop", "to_tensor", "normalize")
MIXING = ("mixup", "cutmix")


class _NumPy1Pickler(pickle._Pickler):
    """Name NumPy's constructors as NumPy 1 did: the public sets are older than NumPy 2."""

    def save_global(self, obj, name=None):
        if getattr(obj, "__module__", None) != "numpy._core.multiarray":
            super().save_global(obj, name)
            return
        self.write(pickle.GLOBAL + f"numpy.core.multiarray\n{obj.__name__}\n".encode())
        self.memoize(obj)


_NUMPY_1_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_NumPy1Pickler)


def _new(path):
    """Return the path of a file to write, in a folder that exists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _plain(value):
    """Return nested values without NumPy scalars and arrays."""
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _tensor(value, dtype=None):
    """Return a tensor with storage of its own."""
    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(np.array(value))
    return value.to(dtype or value.dtype, copy=True).contiguous()


def write_npz(path, names, **arrays):
    """Write one .npz with the names as `keys` and one row of every array for each of them."""
    np.savez(_new(path), keys=np.array([str(name) for name in names]), **arrays)


def write_embeddings(folder, image_paths, embeddings, part_size):
    """Write pooled embeddings as clip-retrieval does: .npy and Parquet parts, row by row.

    The numbers of the parts have as many digits as the number of parts.
    """
    parts = max(1, math.ceil(len(image_paths) / part_size))
    for part in range(parts):
        rows = slice(part * part_size, (part + 1) * part_size)
        number = str(part).zfill(int(math.log10(parts)) + 1)
        path = _new(Path(folder) / "img_emb" / f"img_emb_{number}.npy")
        np.save(path, np.asarray(embeddings[rows]).astype(np.float16))
        table = pa.table({"image_path": pa.array([str(p) for p in image_paths[rows]], pa.string())})
        pq.write_table(table, _new(Path(folder) / "metadata" / f"metadata_{number}.parquet"))


def write_parquet(path, keys, logits):
    """Write a Parquet file as Hugging Face `datasets` does, with three rows a group."""
    logits = [np.asarray(row, np.float32) for row in logits]
    number = {"dtype": "float32", "_type": "Value"}
    features = {"logits": {"feature": number, "_type": "Sequence"}}
    features["key"] = {"dtype": "string", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("logits", pa.list_(pa.float32())), ("key", pa.string())], metadata)
    table = pa.table({"logits": logits, "key": [str(key) for key in keys]}, schema)
    pq.write_table(table, _new(path), row_group_size=3)


def write_e2kd(folder, positions, logits, maps, kind):
    """Write the frozen teacher files of e2KD: one `<position>.pt` for each image.

    :param maps: [n, C, h, w], stored with their own dtype.
    :param kind: `weight` has no axis for teachers and misspells the key of the logits,
        `grad_cam` has an axis of one teacher on both tensors.
    """
    for position, outputs, picture in zip(positions, logits, maps, strict=True):
        outputs, picture = _tensor(outputs), _tensor(picture)
        content = {
            "weight": {"ouptut": outputs, "weight": picture},
            "grad_cam": {"output": outputs[None], "grad_cam": picture[None]},
        }
        torch.save(content[kind], _new(Path(folder) / f"{int(position)}.pt"))


def write_fkd(folder, image_paths, crops, flips, sizes, probabilities, k, fp16, numpy_1=True):
    """Write FKD's soft labels (`marginal_smoothing_k<k>`): a torch file named .tar an image.

    Crops are stored as fractions, and class indices share one float array with the probabilities.

    :param numpy_1: name NumPy's functions as in the public files, not as NumPy 2 does.
    """
    for number, image_path in enumerate(image_paths):
        height, width = (int(side) for side in sizes[number])
        coordinates = np.asarray(crops[number], np.float64) / [height, width, height, width]
        values = _tensor(probabilities[number], torch.float32)
        indices = torch.argsort(values, dim=1, descending=True)[:, :k]
        labels = torch.stack([indices.float(), values.gather(1, indices)], 1).numpy()
        precision = np.float16 if fp16 else np.float32
        coordinates = coordinates.astype(np.float32).astype(precision)
        state = [coordinates, np.array(flips[number], bool), labels.astype(precision)]
        *parents, name = str(image_path).split("/")
        path = _new(Path(folder, *parents[-3:], name.split(".")[0] + ".tar"))
        torch.save(state, path, pickle_module=_NUMPY_1_PICKLE if numpy_1 else pickle)


def _compressed(recipe, mixing):
    """Return a recipe as the list in which ml-dr stores it, when nothing was mixed."""
    recipe = dict(recipe)
    if recipe.get("rand_augment") is not None:
        recipe["rand_augment"] = [(OPERATIONS.index(n), m) for n, m in recipe["rand_augment"]]
    second_image = [None] if mixing else []
    return second_image + list(recipe.values()) + [None] * len(mixing)


def write_imagenet_plus(
    folder, positions, probabilities, k, recipes, image_augmentation, compress=True
):
    """Write ml-dr's reinforcements (ImageNet+): `<position>.pth.tar` and `config.pth.tar`.

    Nothing is mixed, although `image_augmentation` may configure MixUp and CutMix. Without
    `compress` the second of every pair comes from the next view of the next image.

    :param recipes: recipes[n][V], a dict of the value of every transform that has parameters.
    """
    enabled = {n for n, options in image_augmentation.items() if options.get("enable", True)}
    names, fixed, mixing = (
        [name for name in group if name in enabled] for group in (PARAMETRIC, PARAMETERLESS, MIXING)
    )
    positions = [int(position) for position in positions]
    recipes = [[{n: _plain(view.get(n)) for n in names} for view in views] for views in recipes]
    for number, position in enumerate(positions):
        following = (number + 1) % len(positions)
        views = []
        for view, recipe in enumerate(recipes[number]):
            row = np.asarray(probabilities[number][view], np.float32)
            top = np.argpartition(row, -k)[-k:]  # unsorted
            if compress:
                params = _compressed(recipe, mixing)
            else:
                second = recipes[following][(view + 1) % len(recipes[following])]
                params = dict.fromkeys(fixed, ((), ())) | {n: (recipe[n], second[n]) for n in names}
                params |= dict.fromkeys(mixing) | ({"id2": positions[following]} if mixing else {})
            views.append({"params": params, "prob": (row[top].tolist(), top.tolist())})
        path = _new(Path(folder) / f"{position}.pth.tar")
        torch.save((position, views), path, pickle_protocol=4)
    reinforce = {"num_samples": len(recipes[0]), "topk": k, "compress": compress, "joblib": False}
    config = {"dataset": "imagenet", "teacher": {"name": "ig_resnext101_32x8d"}, "batch_size": 32}
    config["reinforce"] = reinforce | {"image_augmentation": image_augmentation}
    config["num_classes"] = len(probabilities[0][0])
    torch.save(config, _new(Path(folder) / "config.pth.tar"))


def write_datacompdr(
    folder, uids, sha256s, recipes, embeddings, bfloat16, per_shard, recipes_as_text=True
):
    """Write shards like DataCompDR's on the Hugging Face Hub, without images.

    :param recipes: recipes[n][V], each ((top, left, height, width), [(operation, magnitude)] * 2).
    :param embeddings: [n, V, D].
    :param recipes_as_text: JSON text inside the JSON, as on the Hub; else a list, as the published
        generator writes it.
    """
    for first in range(0, len(uids), per_shard):
        path = _new(Path(folder) / f"{first // per_shard:08}.tar")
        with webdataset.TarWriter(str(path)) as shard:
            for number in range(first, min(first + per_shard, len(uids))):
                images = np.asarray(embeddings[number], np.float32)
                texts = np.repeat(np.arange(1, 7, dtype=np.float32)[:, None], images.shape[1], 1)
                content = {"image_emb": images, "text_emb": texts}
                if bfloat16:
                    content = {n: _tensor(v, torch.bfloat16) for n, v in content.items()}
                views = _plain(list(recipes[number]))
                views = json.dumps(views) if recipes_as_text else views
                sample = {
                    "__key__": uids[number],
                    "url.txt": f"https://example.com/{uids[number]}.jpg",
                    "syn.json": json.dumps({"syn_text": [f"a photo, {i}" for i in range(5)]}),
                    "paug.json": json.dumps({"param_aug": views}),
                    "json": json.dumps({"uid": uids[number], "sha256": sha256s[number]}),
                    "pth.gz" if bfloat16 else "npz": content,
                }
                shard.write(sample)


def write_theia(folder, model, stems, features, cls_tokens, per_shard):
    """Write Theia's features below the folder of an image set, whose name starts every shard's.

    Theia stores the class tokens of DINOv2 and CLIP with a token axis, [1, C], next to pooled
    ones (half of them here); ViT's without, [C].

    :param features: [n, C, H, W].
    :param cls_tokens: [n, C] or None.
    """
    folder, column = Path(folder), model.replace("/", "_")
    for first in range(0, len(stems), per_shard):
        name = f"{folder.name}_train-{first // per_shard:06d}-train.tar"
        with webdataset.TarWriter(str(_new(folder / column / name))) as shard:
            for number in range(first, min(first + per_shard, len(stems))):
                tensors = {"embedding": features[number]}
                if cls_tokens is not None:
                    token = _tensor(cls_tokens[number])
                    tensors["cls_token"] = token
                    if "facebook_dinov2" in column or "openai_clip" in column:
                        tensors["cls_token"] = token[None]
                        tensors["pooled_cls_token"] = token[None] / 2
                tensors = {n: _tensor(t, torch.bfloat16) for n, t in tensors.items()}
                sample = {"__key__": stems[number]}
                shard.write(sample | {f"{column}.safetensors": safetensors_bytes(tensors)})
    splits = {"train": len(stems), "val": 0, "test": 0}
    (folder / "splits.json").write_text(json.dumps(splits), encoding="utf-8")


def write_tinyvit(folder, names, probabilities, k, ranks):
    """Write TinyViT's saved teacher of one epoch, in the folder `logits_top<k>_epoch0`.

    The ranks take turns. As upstream, the last ranks repeat the first records (other seeds) when
    the records cannot be divided equally.
    """
    generator = np.random.default_rng(0)
    order = [i % len(names) for i in range(math.ceil(len(names) / ranks) * ranks)]
    for rank in range(ranks):
        path = _new(Path(folder) / f"logits_top{k}_epoch0" / f"rank{rank}-keys.txt")
        keys, records = [], []
        for number in dict.fromkeys(order[rank::ranks]):
            values, indices = _tensor(probabilities[number], torch.float32).topk(k)
            seed = np.int32(generator.integers(0, 1 << 31))
            keys.append(f"{names[number]}\n")
            records += [seed.tobytes(), indices.to(torch.int16).numpy().tobytes()]
            records.append(values.to(torch.float16).numpy().tobytes())
        path.write_text("".join(keys), encoding="utf-8")
        path.with_name(f"rank{rank}-values.bin").write_bytes(b"".join(records))


def write_relabel(folder, image_paths, maps, k, legacy=True):
    """Write ReLabel's label maps: the top k logits and, as floats, classes of every cell.

    :param maps: [n, K, 15, 15], logits in the orientation in which they shall be stored.
    :param legacy: torch's format from before 1.6, without a zip, which fits the size of the set.
    """
    for image_path, scores in zip(image_paths, maps, strict=True):
        values, classes = _tensor(scores, torch.float32).topk(k, dim=0)
        *parents, name = str(image_path).split("/")
        path = _new(Path(folder, *parents[-1:], name.split(".")[0] + ".pt"))
        content = torch.stack([values, classes.float()])
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
