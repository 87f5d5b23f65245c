"""Card of a shared pass: what others must know of it."""

from __future__ import annotations

import shlex
from typing import Any

from permafrost.config.data import SOURCES
from permafrost.core.yaml_text import dump_yaml
from permafrost.loading.target_sheet import sheets_of
from permafrost.store.manifest import INGESTED
from permafrost.store.reader import Store, TeacherPass
from permafrost_exchange.options import ShareConfig
from permafrost_exchange.passport import TEACHER_WEIGHTS
from permafrost_export.card import fact_table, license_id, plain_text


def attach_command(folder: str, store: str, plugin: str) -> str:
    """Return the command that joins a shared pass to a store, in a shell or a card.

    Args:
        folder: Folder of the share.
        store: The store.
        plugin: Path of the explainer's code in the folder, empty for an installed one.
    """
    code = [f"plugins=[{folder}/{plugin}]"] if plugin else []
    return shlex.join(["permafrost", "attach", *code, f"from={folder}", f"store.path={store}"])


def dataset_name(store: Store) -> str:
    """Return the name of a store's data set: that of its source, or of its folder where a source is a kind of files."""
    name = store.manifest.dataset.name
    return f"{store.folder.name} ({name})" if name in SOURCES else name


def card_of_pass(store: Store, shared: TeacherPass, config: ShareConfig, plugin: str = "") -> str:
    """Return the README.md of a shared pass.

    Args:
        store: Store of the pass.
        shared: The pass.
        config: Options of the command, with the licenses.
        plugin: Path of the explainer's code in the folder, empty for an installed one.
    """
    manifest = shared.manifest
    teacher, made_with = manifest.teacher, manifest.made_with
    described = teacher.get("architecture", {})
    weights = f"sha256 {teacher.get('weights_sha256')}"
    name, dataset, files = described.get("name") or shared.name, dataset_name(store), {}
    if described.get("kind") == INGESTED:
        name = shared.name.rpartition("-")[0]
        digest = made_with.get("targets_sha256", teacher.get("weights_sha256"))
        files["targets from"] = f"{made_with.get('targets')}, sha256 {digest}"
        weights = made_with.get(TEACHER_WEIGHTS, "not named")
    rows = {
        "data set": f"{dataset}, {shared.shards.num_rows:,} records",
        "teacher": f"{described.get('kind', '')} {name}".strip(),
        "weights": weights,
        **files,
        "classes": str(teacher.get("classes")),
        "part of the image": str(teacher.get("frame")),
        "keys": "names of the image files"
        if config.keys
        else "numbers, in place of names of files",
        "views": f"{shared.num_views} ({manifest.views['sampler']})",
        "explainer": shared.explainer or "none",
        "temperatures": ", ".join(map(str, manifest.temperatures))
        or ("all logits are stored" if manifest.has_logits else "no logits"),
    }
    if manifest.passport is not None:
        agreement = manifest.passport.agreement
        rows["compared with the teacher"] = (
            f"{manifest.passport.teacher}, {agreement.records} records"
            + ("" if agreement.top1 is None else f", same first class for {agreement.top1:.1%}")
            + f"; {made_with['maps']}" * bool(made_with.get("maps"))
        )
    rows |= {
        f"{subject}: {name}": text
        for subject, sheet in sheets_of(store, shared).items()
        if subject != "machine"
        for name, text in sheet.rows().items()
    }
    fields = [
        f"| `{spec.name}` | {spec.dtype} | {' x '.join(map(str, spec.shape)) or '1'} | {_fidelity(shared, spec.name)} |"
        for spec in manifest.fields
    ]
    header: dict[str, Any] = {
        "license": license_id(config.licenses["targets"]),
        "tags": ["knowledge-distillation", "permafrost"],
        "pretty_name": f"{dataset} targets of {name}",
    }
    if config.form == "huggingface":
        splits = sorted(
            {shard.split for shard in store.shards if shared.rows_of(shard).max(initial=-1) >= 0}
        )
        header |= {
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [
                        {"split": split, "path": f"data/{split}-*.parquet"} for split in splits
                    ],
                }
            ]
        }
    return "\n".join(
        [
            "---",
            dump_yaml(header).rstrip(),
            "---",
            "",
            f"# Targets of {plain_text(str(name))} on {plain_text(dataset)}",
            "",
            "Outputs of a frozen teacher, one row per image"
            + (" and view" if shared.num_views > 1 else "")
            + (", with the images." if config.images else ", without the images."),
            "",
            *fact_table(rows),
            "",
            "| field | dtype | shape per view | lowest cosine to the teacher's values |",
            "|---|---|---|---|",
            *fields,
            "",
            "| what | license |",
            "|---|---|",
            *(f"| {name} | {plain_text(text)} |" for name, text in sorted(config.licenses.items())),
            "",
            *_usage(config, shared, plugin),
            "",
        ]
    )


def _fidelity(shared: TeacherPass, field: str) -> str:
    cosine = shared.manifest.fidelity.get(field)
    return "exact" if cosine is None else f"{cosine:.5f}"


def _usage(config: ShareConfig, shared: TeacherPass, plugin: str) -> list[str]:
    if config.form == "webdataset":
        command = attach_command("<this folder>", "<store>", plugin)
        return [
            f"To join them to a store of the same images: `{command}`.",
            *[f"Read `{plugin}` before you name it: it is run."] * bool(plugin),
            "Other readers find `<key>.<field>.npy` in `targets/*.tar`, and the keys and digests of the images in "
            "`records.parquet`.",
        ]
    if config.form == "embeddings":
        return [
            "Row n of `img_emb/img_emb_<i>.npy` is of the image in row n of `metadata/metadata_<i>.parquet`."
        ]
    return [
        'In Python: `datasets.load_dataset("<this folder>")`. Lists are flat; their shapes are in the table above, '
        "with the views first."
    ]
