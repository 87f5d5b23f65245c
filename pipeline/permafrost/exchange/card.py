"""Cards of shared passes and of exported students: what others must know, in Hugging Face's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from permafrost.config.exchange import ShareConfig
from permafrost.core.errors import printable
from permafrost.core.yaml_text import dump_yaml
from permafrost.store.reader import Store, TeacherPass

_SPDX = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARKS = re.compile(r"[\\`*_~\[\]<>|]|(?<=:)//")
"""Characters that mean something in Markdown."""


def card_of_pass(store: Store, shared: TeacherPass, config: ShareConfig) -> str:
    """Return the README.md of a shared pass.

    Args:
        store: Store of the pass.
        shared: The pass.
        config: Options of the command, with the licenses.
    """
    manifest = shared.manifest
    teacher = manifest.teacher
    described = teacher.get("architecture", {})
    views = manifest.views
    rows = {
        "data set": f"{store.manifest.dataset.name}, {shared.shards.num_rows:,} records",
        "teacher": f"{described.get('kind', '')} {described.get('name', '')}".strip(),
        "weights": f"sha256 {teacher.get('weights_sha256')}",
        "classes": str(teacher.get("classes")),
        "part of the image": str(teacher.get("frame")),
        "views": f"{shared.num_views} ({views['sampler']})",
        "explainer": shared.explainer or "none",
        "temperatures": ", ".join(map(str, manifest.temperatures)) or "all logits are stored",
    }
    if manifest.passport is not None:
        agreement = manifest.passport.agreement
        rows["compared with the teacher"] = (
            f"{manifest.passport.teacher}, {agreement.records} records"
            + ("" if agreement.top1 is None else f", same first class for {agreement.top1:.1%}")
        )
    fields = [
        f"| `{spec.name}` | {spec.dtype} | {' x '.join(map(str, spec.shape)) or '1'} | {_fidelity(shared, spec.name)} |"
        for spec in manifest.fields
    ]
    license_name = config.licenses["targets"].lower()
    header: dict[str, Any] = {
        "license": license_name if _SPDX.fullmatch(license_name) else "other",
        "tags": ["knowledge-distillation", "permafrost"],
        "pretty_name": f"{store.manifest.dataset.name} targets of {described.get('name', shared.name)}",
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
            f"# Targets of {_plain(str(described.get('name', shared.name)))} on "
            f"{_plain(store.manifest.dataset.name)}",
            "",
            "Outputs of a frozen teacher, one row per image"
            + (" and view" if shared.num_views > 1 else "")
            + (", with the images." if config.images else ", without the images."),
            "",
            *_table(rows),
            "",
            "| field | dtype | shape per view | lowest cosine to the teacher's values |",
            "|---|---|---|---|",
            *fields,
            "",
            "| what | license |",
            "|---|---|",
            *(f"| {name} | {_plain(text)} |" for name, text in sorted(config.licenses.items())),
            "",
            *_usage(config, shared),
            "",
        ]
    )


def _plain(text: str) -> str:
    """Return a text of a stranger as Markdown shows it: without links, tags, cells of a table or control characters."""
    return _MARKS.sub(r"\\\g<0>", printable(text))


def _fidelity(shared: TeacherPass, field: str) -> str:
    cosine = shared.manifest.fidelity.get(field)
    return "exact" if cosine is None else f"{cosine:.5f}"


def _table(rows: Mapping[str, str]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {name} | {_plain(text)} |" for name, text in rows.items()),
    ]


def _usage(config: ShareConfig, shared: TeacherPass) -> list[str]:
    if config.form == "webdataset":
        return [
            "To join them to a store of the same images: `permafrost attach from=<this folder> store.path=<store>`.",
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


def card_of_student(facts: Mapping[str, Any]) -> str:
    """Return the README.md of an exported student.

    Args:
        facts: Name, license, classes, teacher, method and accuracy by what they are; None is left out.
    """
    shown = {name: str(value) for name, value in facts.items() if value not in (None, "", [])}
    license_name = shown.pop("license", "other").lower()
    header = {
        "license": license_name if _SPDX.fullmatch(license_name) else "other",
        "library_name": "timm" if shown.pop("is_timm", "") == "True" else "pytorch",
        "tags": ["image-classification", "knowledge-distillation"],
    }
    name = shown.pop("name", "student")
    lines = ["---", dump_yaml(header).rstrip(), "---", "", f"# {_plain(name)}", ""]
    return "\n".join([*lines, *_table(shown), ""])
