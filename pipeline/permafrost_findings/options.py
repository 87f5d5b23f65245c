"""Rules about folders, labels, pictures and appended records, and how they enter, each with the fact that it marks."""

from __future__ import annotations

from permafrost.config.data import FACTS_OF_FINDINGS, FINDINGS, STORE_FINDINGS

_RULES = {
    "class_folders_repeat": ("classes", "folder_rules:find_repeating_folders"),
    "folders_too_deep": ("classes", "folder_rules:find_folders_too_deep"),
    "splits_in_classes": ("classes", "folder_rules:find_splits_in_classes"),
    "single_folder": ("classes", "folder_rules:find_single_folder"),
    "nested_class_folders": ("classes", "folder_rules:find_nested_folders"),
    "other_things": ("images", "folder_rules:find_other_things"),
    "same_names": ("images", "folder_rules:find_same_names"),
    "members_left_out": ("left out", "folder_rules:find_members_left_out"),
    "files_left_out": ("left out", "folder_rules:find_files_left_out"),
    "pictures_left_out": ("images", "folder_rules:find_pictures_left_out"),
    "damaged_files": ("images", "folder_rules:find_damaged_files"),
    "split_spellings": ("records", "folder_rules:find_split_spellings"),
    "classes_without_names": ("classes", "label_rules:find_classes_without_names"),
    "classes_like_splits": ("classes", "label_rules:find_classes_like_splits"),
    "unusual_splits": ("records", "label_rules:find_unusual_splits"),
    "empty_classes": ("classes", "label_rules:find_empty_classes"),
    "numbered_folders": ("classes", "label_rules:find_numbered_folders"),
    "class_spellings": ("classes", "label_rules:find_other_spellings"),
    "classes_of_one_split": ("classes", "label_rules:find_classes_of_one_split"),
    "unequal_classes": ("classes", "label_rules:find_unequal_classes"),
    "unknown_classes": ("classes", "label_rules:find_unknown_classes"),
    "background_classes": ("classes", "label_rules:find_background_classes"),
    "labels_of_nothing": ("labels", "label_rules:find_labels_of_nothing"),
    "class_per_record": ("classes", "label_rules:find_identifiers"),
    "category_order": ("classes", "table_rules:find_category_order"),
    "quoted_classes": ("classes", "label_rules:find_quoted_classes"),
    "mixed_numbers": ("classes", "label_rules:find_mixed_numbers"),
    "groups_across_splits": ("groups", "label_rules:find_shared_groups"),
    "blank_groups": ("groups", "label_rules:find_blank_groups"),
    "label_gaps": ("labels", "label_rules:find_label_gaps"),
    "signed_labels": ("labels", "label_rules:find_signed_labels"),
    "missing_labels": ("labels", "label_rules:find_missing_labels"),
    "joined_labels": ("labels", "label_rules:find_joined_labels"),
    "label_separator": ("labels", "label_rules:find_separators"),
    "unknown_cells": ("labels", "label_rules:find_unknown_cells"),
    "fractions": ("labels", "label_rules:find_fractions"),
    "one_hot_labels": ("labels", "label_rules:find_one_hot_labels"),
    "constant_labels": ("labels", "label_rules:find_constant_labels"),
    "flag_column": ("labels", "label_rules:find_flag_column"),
    "boxes_of_other_labels": ("boxes", "label_rules:find_boxes_of_other_labels"),
    "unread_columns": ("labels", "table_rules:find_unread_columns"),
    "unread_split": ("records", "table_rules:find_unread_split"),
    "one_hot_columns": ("labels", "table_rules:find_one_hot_columns"),
    "normalized_boxes": ("boxes", "label_rules:find_normalized_boxes"),
    "json_next_to_cls": ("labels", "label_rules:find_json_next_to_cls"),
    "dark_images": ("depth", "picture_rules:find_dark_images"),
    "turned_regions": ("boxes", "picture_rules:find_turned_regions"),
    "regions_outside": ("boxes", "picture_rules:find_regions_outside"),
    "mask_values": ("boxes", "picture_rules:find_mask_values"),
    "blank_images": ("images", "picture_rules:find_blank_images"),
    "dim_images": ("brightness", "picture_rules:find_dim_images"),
    "dropped_channels": ("images", "picture_rules:find_dropped_channels"),
    "traits_of_classes": ("images", "picture_rules:find_traits_of_classes"),
    "darker_items": ("depth", "picture_rules:find_darker_items"),
    "traits_of_splits": ("images", "picture_rules:find_traits_of_splits"),
    "strips": ("proportions", "picture_rules:find_strips"),
    "brightness_of_splits": ("brightness", "picture_rules:find_brightness_of_splits"),
    "equal_in_sample": ("equal images", "equal_images:find_equal_in_sample"),
    "bursts": ("records", "equal_images:find_bursts_in_splits"),
    "new_classes": ("classes", "append_rules:find_new_classes"),
    "other_brightness": ("brightness", "append_rules:find_other_brightness"),
    "packed_copies": ("equal images", "append_rules:find_packed_copies"),
}
"""The fact of the data that a finding marks as doubtful, and its rule in this package, by its name."""

for _finding, (_fact, _rule) in _RULES.items():
    FINDINGS[_finding] = f"permafrost_findings.{_rule}"
    FACTS_OF_FINDINGS[_finding] = _fact
STORE_FINDINGS["equal_images"] = "permafrost_findings.equal_images:find_equal_images"
FACTS_OF_FINDINGS.update(
    dict.fromkeys(
        ("equal_in_splits", "similar_in_splits", "equal_in_classes", "equal_images"), "equal images"
    )
)
