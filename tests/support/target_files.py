"""Files of targets in other tools' formats, written from their descriptions (docs/howto/exchange.md)."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def write_npz(path, names, **arrays):
    """Write arrays with a row per name."""
    np.savez_compressed(path, keys=np.array(names), **arrays)


def write_embeddings(folder, image_paths, embeddings, part_size):
    """Write the parts of clip-retrieval."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part, start in enumerate(range(0, len(image_paths), part_size)):
        rows = slice(start, start + part_size)
        np.save(folder / f"img_emb/img_emb_{part}.npy", embeddings[rows].astype("float16"))
        table = pa.table({"image_path": list(image_paths[rows])})
        pq.write_table(table, folder / f"metadata/metadata_{part}.parquet")


def write_parquet(path, keys, logits):
    """Write a column of lists of equal length."""
    length = logits.shape[1]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), length)
    pq.write_table(pa.table({"key": list(keys), "logits": lists}), path)


def write_e2kd(folder, positions, logits, maps, kind):
    """Write a torch file per image."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, row, explained in zip(positions, logits, maps, strict=True):
        content = {
            "weight": {"ouptut": torch.tensor(row), "weight": torch.tensor(explained)},
            "grad_cam": {
                "output": torch.tensor(row)[None],
                "grad_cam": torch.tensor(explained)[None],
            },
        }
        torch.save(content[kind], folder / f"{position}.pt")


def write_fkd(folder, image_paths, crops, flips, sizes, probabilities, k, fp16):
    """Write coordinates, flips and the largest probabilities of all views of an image in a torch file."""
    for row, name in enumerate(image_paths):
        height, width = sizes[row]
        coordinates = crops[row] / np.array([height, width, height, width])
        order = np.argsort(-probabilities[row], axis=1)[:, :k]
        values = np.take_along_axis(probabilities[row], order, 1)
        labels = np.stack([order.astype("float32"), values.astype("float32")], axis=1)
        kind = "float16" if fp16 else "float32"
        path = (folder / name).with_suffix(".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        state = [coordinates.astype(kind), np.array(flips[row]), labels.astype(kind)]
        torch.save(state, path)


def _compressed(recipe, augmentation):
    names = ("random_crop", "random_resized_crop", "random_horizontal_flip", "rand_augment")
    values = [None] if {"mixup", "cutmix"} & augmentation.keys() else []
    for name in (*names, "random_erase"):
        if name not in augmentation:
            continue
        value = recipe[name]
        if name == "rand_augment" and value is not None:
            value = [(OPERATIONS.index(operation), magnitude) for operation, magnitude in value]
        values.append(value)
    return values + [None for name in ("mixup", "cutmix") if name in augmentation]


def write_imagenet_plus(
    folder, positions, probabilities, k, recipes, image_augmentation, compress=True
):
    """Write recipes and the largest probabilities of an image in a torch file, beside the options."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"reinforce": {"image_augmentation": image_augmentation, "compress": compress}}
    torch.save(config, folder / "config.pth.tar")
    for row, position in enumerate(positions):
        samples = []
        for recipe, outputs in zip(recipes[row], probabilities[row], strict=True):
            classes = np.argsort(outputs)[-k:]
            params = {name: (value, value) for name, value in recipe.items()}
            if compress:
                params = _compressed(recipe, image_augmentation)
            samples.append(
                {"params": params, "prob": (outputs[classes].tolist(), classes.tolist())}
            )
        torch.save((int(position), samples), folder / f"{position}.pth.tar")


def _add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_datacompdr(folder, uids, sha256s, recipes, embeddings, bfloat16, per_shard):
    """Write members of recipes, embeddings and the digest of an image in tars."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(uids), per_shard)):
        with tarfile.open(folder / f"{shard:08d}.tar", "w") as tar:
            for row in range(start, min(start + per_shard, len(uids))):
                uid, data = uids[row], io.BytesIO()
                text = json.dumps([[list(box), operations] for box, operations in recipes[row]])
                _add(tar, f"{uid}.url.txt", b"https://example.org/image.jpg")
                _add(tar, f"{uid}.paug.json", json.dumps({"param_aug": text}).encode())
                if bfloat16:
                    values = torch.tensor(embeddings[row]).bfloat16()
                    torch.save({"image_emb": values}, data)
                    _add(tar, f"{uid}.pth.gz", gzip.compress(data.getvalue()))
                else:
                    np.savez(data, image_emb=embeddings[row].astype("float32"))
                    _add(tar, f"{uid}.npz", data.getvalue())
                facts = {"uid": uid, "sha256": sha256s[row]}
                _add(tar, f"{uid}.json", json.dumps(facts).encode())


def _safetensors(tensors):
    header, body = {}, b""
    for name, values in tensors.items():
        data = (values.astype("float32").view("uint32") >> 16).astype("uint16").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def write_theia(folder, model, stems, features, cls_tokens, per_shard):
    """Write a safetensors member per image in tars of a teacher's folder."""
    (folder / model).mkdir(parents=True)
    for shard, start in enumerate(range(0, len(stems), per_shard)):
        with tarfile.open(folder / model / f"images_train-{shard:06d}-train.tar", "w") as tar:
            for row in range(start, min(start + per_shard, len(stems))):
                tensors = {"embedding": features[row]}
                if cls_tokens is not None:
                    # Theia stores those of DINOv2 with an axis of tokens.
                    tensors["cls_token"] = cls_tokens[row][None if "dinov2" in model else ...]
                _add(tar, f"{stems[row]}.{model}.safetensors", _safetensors(tensors))


def write_tinyvit(folder, names, probabilities, k, ranks):
    """Write keys as lines and records as bytes, a pair of files per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        rows = range(rank, len(names), ranks)
        (folder / f"rank{rank}-keys.txt").write_text("".join(f"{names[r]}\n" for r in rows))
        data = b""
        for row in rows:
            order = np.argsort(-probabilities[row])[:k]
            data += struct.pack("<i", row)
            data += order.astype("<i2").tobytes()
            data += probabilities[row][order].astype("<f2").tobytes()
        (folder / f"rank{rank}-values.bin").write_bytes(data)


def write_relabel(folder, image_paths, maps, k):
    """Write the largest scores of each cell and their classes in a torch file per image."""
    for name, scores in zip(image_paths, maps, strict=True):
        values, classes = torch.tensor(scores).topk(k, dim=0)
        path = (folder / Path(name)).with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([values, classes.float()]), path)
