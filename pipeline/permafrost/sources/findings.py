"""Findings of a preview: a family of rules, each of which looks for one kind of problem.

    FINDINGS["watermarks"] = find_watermarks        # of a plug-in: a function of a Preview that yields (level, message)

A message states what was understood, with an example, and the fix. An error stops `precompute` unless data.accept
names the finding. Messages are kept next to stores, so they name no absolute path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

from permafrost.config.data import FileDataConfig
from permafrost.config.plugins import Family
from permafrost.config.suggestions import suggest
from permafrost.core.errors import ConfigError, UserError, quote
from permafrost.sources import folder_rules, label_rules, picture_rules
from permafrost.sources.data_preview import Doubt, Finding, Preview

logger = logging.getLogger("permafrost.precompute")

Rule: TypeAlias = Callable[[Preview], Iterable[Doubt]]

_DAMAGED = "damaged_files"
"""Finding of files that cannot be packed, whatever the user means."""


FINDINGS: Family[Rule] = Family(
    {
        "class_folders_repeat": folder_rules.find_repeating_folders,
        "folders_too_deep": folder_rules.find_folders_too_deep,
        "splits_in_classes": folder_rules.find_splits_in_classes,
        "single_folder": folder_rules.find_single_folder,
        "nested_class_folders": folder_rules.find_nested_folders,
        "other_things": folder_rules.find_other_things,
        "same_names": folder_rules.find_same_names,
        "members_left_out": folder_rules.find_members_left_out,
        "files_left_out": folder_rules.find_files_left_out,
        "pictures_left_out": folder_rules.find_pictures_left_out,
        _DAMAGED: folder_rules.find_damaged_files,
        "split_spellings": folder_rules.find_split_spellings,
        "classes_without_names": label_rules.find_classes_without_names,
        "classes_like_splits": label_rules.find_classes_like_splits,
        "unusual_splits": label_rules.find_unusual_splits,
        "empty_classes": label_rules.find_empty_classes,
        "numbered_folders": label_rules.find_numbered_folders,
        "class_spellings": label_rules.find_other_spellings,
        "classes_of_one_split": label_rules.find_classes_of_one_split,
        "unknown_classes": label_rules.find_unknown_classes,
        "background_classes": label_rules.find_background_classes,
        "class_per_record": label_rules.find_identifiers,
        "category_order": label_rules.find_category_order,
        "quoted_classes": label_rules.find_quoted_classes,
        "mixed_numbers": label_rules.find_mixed_numbers,
        "groups_across_splits": label_rules.find_shared_groups,
        "label_gaps": label_rules.find_label_gaps,
        "signed_labels": label_rules.find_signed_labels,
        "missing_labels": label_rules.find_missing_labels,
        "joined_labels": label_rules.find_joined_labels,
        "label_separator": label_rules.find_separators,
        "unknown_cells": label_rules.find_unknown_cells,
        "fractions": label_rules.find_fractions,
        "one_hot_labels": label_rules.find_one_hot_labels,
        "one_hot_columns": label_rules.find_one_hot_columns,
        "normalized_boxes": label_rules.find_normalized_boxes,
        "json_beside_cls": label_rules.find_json_beside_cls,
        "dark_images": picture_rules.find_dark_images,
        "turned_regions": picture_rules.find_turned_regions,
        "regions_outside": picture_rules.find_regions_outside,
        "mask_values": picture_rules.find_mask_values,
        "blank_images": picture_rules.find_blank_images,
        "dim_images": picture_rules.find_dim_images,
        "dropped_channels": picture_rules.find_dropped_channels,
        "traits_of_classes": picture_rules.find_traits_of_classes,
        "traits_of_splits": picture_rules.find_traits_of_splits,
    }
)
"""Rules by the name of their findings."""


def add_findings(preview: Preview) -> Preview:
    """Return a preview with the findings of all rules, errors first.

    Raises:
        ConfigError: If data.accept names no finding.
    """
    accepted = preview.data.accept if isinstance(preview.data, FileDataConfig) else ()
    for name in accepted:
        if name not in FINDINGS:
            raise ConfigError(
                f"data.accept: there is no finding {quote(name)}{suggest(name, FINDINGS)}; findings are: "
                f"{', '.join(FINDINGS)}"
            )
    findings = [
        Finding(
            name=name,
            level="warning"
            if level == "error" and name in accepted and name != _DAMAGED
            else level,
            message=message,
        )
        for name, rule in FINDINGS.items()
        for level, message in rule(preview)
    ]
    levels = ("error", "warning", "note")
    findings.sort(key=lambda finding: levels.index(finding.level))
    return replace(preview, findings=tuple(findings))


class DataError(UserError):
    """Error for data that were probably misunderstood, according to a finding."""


def check_findings(preview: Preview) -> None:
    """Log warnings and notes, one line each.

    Raises:
        DataError: If there are findings that are errors; it has a line for each.
    """
    for finding in preview.findings:
        if finding.level == "warning":
            logger.warning("warning: %s (%s)", finding.message, finding.name)
        elif finding.level == "note":
            logger.info("%s (%s)", finding.message, finding.name)
    errors = preview.with_level("error")
    if not errors:
        return
    lines = [f"{finding.message} ({finding.name})" for finding in errors]
    lines[-1] += f". Nothing was packed by this command{accept_hint(preview)}"
    error = DataError(" ".join(lines))
    error.lines = lines
    raise error


def accept_hint(preview: Preview) -> str:
    """Return what to add to a message so that the user can accept its errors; empty if that would not help."""
    names = list(dict.fromkeys(finding.name for finding in preview.with_level("error")))
    names = [name for name in names if name in FINDINGS and name != _DAMAGED]
    return f"; if the data are as you mean them: data.accept=[{','.join(names)}]" if names else ""
