"""Rules of findings about classes, labels and pixels."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

from permafrost.core.errors import quote, shorten
from permafrost.core.records import are_numbers
from permafrost.sources.classes import has_leading_zero, is_unknown, to_number
from permafrost.sources.data_preview import Preview, Remark
from permafrost.sources.image_folder import EMPTY_FOLDERS
from permafrost.sources.image_table import JOINED, NUMBERED, SEPARATED
from permafrost.sources.label_cells import LABEL_LISTS, UNLABELED_CELLS
from permafrost.sources.several_files import absent_parts
from permafrost.sources.splits import TRAIN, known_split
from permafrost.sources.table_files import UNKNOWN_CELLS
from permafrost.sources.tally import BOXES, REST
from permafrost.store.facts import Level
from permafrost_findings.folder_rules import describe_items
from permafrost_findings.thresholds import (
    MAX_SMALL_GROUP,
    MIN_ALONE,
    MIN_ALONE_SHARE,
    MIN_GROUPS,
    MIN_IDENTIFIERS,
    MIN_JOINED_SHARE,
    MIN_ONE_HOT_SHARE,
    MIN_PER_CLASS,
    MIN_SIGNED_SHARE,
    MOSTLY_ALONE,
)
from permafrost_sources.webdataset import (
    IGNORED_JSON,
    JSON_KEYS,
    NUMBERED_TARS,
    UNKNOWN_LABELS,
    UNLABELED_MEMBERS,
)

_UNKNOWN_CLASSES = re.compile(
    r"\?+|-+|none|null|nil|unknown|undefined|missing|unlabell?ed|n\.a\.|na|not available|tbd|todo|no ?label|"
    "unspecified|void"
)
"""Names of classes, in lower case, that may mean an unknown label."""
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", re.ASCII)
_SPLIT_WORD = re.compile("train(ing)?|test(ing)?|valid(ation)?|val")
_NO_OBJECTS = re.compile(r"\d*(background(google|noise)?|clutter|distractors?|junk|silence)")
"""Names of catch-all classes, in lower case without separators."""
_NOTHING = re.compile(
    r"(no|none|non|not|without|kein\w*|ohne|sin|ning[uú]n\w*|sans|aucune?|pas d\w*|senza|nessun\w*|sem|nenhuma?|geen|"
    r"ingen|brak|без|нет)( .+)?|nothing|neither|o b|normal(e|es|ny)?|healthy|gesund|san[oa]|saine?|saud[aá]vel|neg|"
    r"negativ[aoe]?|unremarkable|clear|clean|empty|nada|rien|niente|nichts|norm|норма|正常|无|無|なし|異常なし|정상|없음"
)
"""Names of labels, in lower case with blanks for separators, that may mean that no other label holds."""
_FLAGS = frozenset({"0", "1", "true", "false", "yes", "no", "y", "n"})
_UNEQUAL = 10
"""Records of the largest class for each record of the smallest one from which on classes are unequal."""

# ---- classes ---------------------------------------------------------------------------------------


def find_empty_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes without images or records."""
    if empty := preview.tally[EMPTY_FOLDERS]:
        yield (
            "warning",
            "class folders without images are left out "
            f"({preview.tally.total(EMPTY_FOLDERS):,}): {shorten(sorted(empty), 5)}; "
            "data.classes=<file> would keep their classes",
        )
    names = [name for label, name in enumerate(preview.classes) if not preview.has_records(label)]
    if names and preview.counts.labeled and not _have_no_names(preview):
        yield (
            "warning",
            f"classes without records ({len(names):,} of {len(preview.classes):,}): {shorten(names, 10)}; a network "
            "has an output for each of them",
        )
    if names and names[0] == preview.classes[0] and preview.data_classes is not None:
        yield (
            "warning",
            f"the first line of data.classes, {quote(names[0])}, has no records; it may be a header",
        )
    if len(preview.classes) == 1:
        yield "warning", f"all labels are of one class, {quote(preview.classes[0])}"


def find_numbered_folders(preview: Preview) -> Iterator[Remark]:
    """Find class folders that are numbers, whose order others may read differently."""
    is_of_folders = preview.source == "image_folder"
    if not (is_of_folders or preview.source == "webdataset") or preview.data_classes is not None:
        return
    names = preview.classes
    yield from (
        (
            "note",
            f"class folders are numbered, but {quote(name)} is absent ({absent:,} in total), so that labels of those "
            "after it are smaller than their numbers; data.classes=<file> with all names would keep a class for it",
        )
        for name, absent in (absent_parts(names) if is_of_folders else ())
    )
    if not names or any(to_number(name) is None for name in names):
        return
    odd = [name for name in names if str(to_number(name)) != name and not has_leading_zero(name)]
    if odd:
        yield (
            "error",
            f"all classes are numbers, but {shorten(odd, 3)} are written in a way that a table would read as "
            "another name; rename them, or list them in data.classes",
        )
    elif is_of_folders and list(names) != sorted(names):
        by_text = sorted(names)
        place = next(position for position, name in enumerate(names) if by_text[position] != name)
        yield (
            "warning",
            f"class folders are whole numbers, in the order of their values (label {place} is {names[place]!r}); "
            f"torchvision's ImageFolder sorts them as text (label {place} would be {by_text[place]!r}): for a teacher "
            "that was trained with it, list the folders in that order in data.classes=<file>",
        )


def find_other_spellings(preview: Preview) -> Iterator[Remark]:
    """Find classes whose names differ by accident only."""
    groups = defaultdict(list)
    for label, name in enumerate(preview.classes):
        groups[_spelling(name)].append(label)
    twins = [labels for labels in groups.values() if len(labels) > 1]
    if not twins:
        return
    separate = [labels for labels in twins if _are_in_other_splits(preview, labels)]
    text = [
        " and ".join(quote(preview.classes[label]) for label in labels)
        for labels in (separate or twins)[:5]
    ]
    where = ", which no split has together," if separate else ""
    yield (
        "error" if separate else "warning",
        f"classes{where} are spelled in several ways ({len(separate or twins):,}): {'; '.join(text)}; use one spelling",
    )


def _spelling(name: str) -> str:
    """Return a name without what differs by accident: case, separators, invisible characters, marks of copies."""
    number = to_number(name)
    if number is not None:
        return f"#{number}"
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(
        character for character in text if unicodedata.category(character) not in ("Cf", "Cc")
    )
    text = re.sub(r"[\s_-]*(\(\d+\)|\bcopy|\bkopie)$|^copy of ", "", text)
    return re.sub(r"(?<=\w)[\s_.-]+(?=\w)|_", " ", text).strip() or name


def _are_in_other_splits(preview: Preview, labels: list[int]) -> bool:
    splits = [
        {split for split in preview.counts.records if (split, label) in preview.counts.labeled}
        for label in labels
    ]
    return all(splits) and not set.intersection(*splits)


def find_classes_without_names(preview: Preview) -> Iterator[Remark]:
    """Find classes of tars or a table that are numbers alone."""
    takes_list = hasattr(preview.data, "classes") and preview.data.kind != "image_folder"
    if takes_list and preview.data_classes is None and are_numbers(preview.classes):
        yield (
            "warning",
            f"the {len(preview.classes):,} classes are numbers without names, so they cannot be compared with those of "
            "a network, of a share or of another store; name them with data.classes=FILE, a text file with a name a "
            "line, which can also be done later by the same command",
        )


def find_classes_of_one_split(preview: Preview) -> Iterator[Remark]:
    """Find classes that only one of the splits has."""
    splits = [split for split in preview.counts.records if preview.labels_of(split)]
    if TRAIN not in splits:
        return
    trained = preview.labels_of(TRAIN)
    for split in sorted(set(splits) - {TRAIN}):
        labels = preview.labels_of(split)
        new, lacking = sorted(labels - trained), sorted(trained - labels)
        if not labels & trained:
            yield (
                "error",
                f"split {split} and split {TRAIN} have no class in common: {preview.names_of(labels)} and "
                f"{preview.names_of(trained)}; their classes are named in different ways, or folders were "
                "misunderstood",
            )
        elif new:
            yield (
                "warning",
                f"split {TRAIN} lacks classes of split {split} ({len(new):,}): {preview.names_of(new)}",
            )
        if labels & trained and lacking:
            yield (
                "warning",
                f"split {split} lacks classes of split {TRAIN} ({len(lacking):,}): {preview.names_of(lacking)}",
            )


def find_unequal_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes that have many times the records of others of the training split."""
    counts = {label: preview.count(TRAIN, label) for label in preview.labels_of(TRAIN)}
    low, high = (rule(counts, key=counts.__getitem__, default=0) for rule in (min, max))
    if counts and counts[high] >= _UNEQUAL * counts[low]:
        yield (
            "warning",
            f"class {quote(preview.classes[high])} of split {TRAIN} has {counts[high]:,} records, and "
            f"{quote(preview.classes[low])} has {counts[low]:,}: accuracy hides small classes, so look at "
            "mean_class_accuracy, and see trainer.sampling=",
        )


def find_unknown_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes whose names may mean that the label is unknown."""
    has_list = preview.data_classes is not None
    words = [name for name in preview.classes if is_unknown(name.strip()) or name.strip() == "-1"]
    if words and not has_list:
        yield (
            "error",
            f"the classes {shorten(words, 5)} are words that programs write for an unknown label; rename or remove "
            "them, or list all classes in data.classes=<file>",
        )
    doubtful = [
        name
        for name in preview.classes
        if _UNKNOWN_CLASSES.fullmatch(name.strip().lower())
        and name not in {*words, *_labels_of_nothing(preview)}
    ]
    if doubtful and not has_list:
        yield (
            "warning",
            f"the classes {shorten(doubtful, 5)} may mean that a label is unknown; they are classes here",
        )


def find_background_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes that do not stand for objects, such as BACKGROUND_Google of Caltech 101."""
    names = [
        name
        for name in preview.classes
        if _NO_OBJECTS.fullmatch(re.sub(r"[\W_]+", "", name.lower()))
        and name not in _labels_of_nothing(preview)
    ]
    if names and len(preview.classes) > 2 and preview.source != "torchvision":
        yield (
            "warning",
            f"the classes {shorten(names, 3)} are named like a collection of everything else, and are "
            "classes with an output here; leave them out with data.only_classes if they are not meant",
        )


def _labels_of_nothing(preview: Preview) -> dict[str, int]:
    """Return labels that seem to mean that no other label holds, and how many records have them."""
    counts, found = preview.counts, {}
    records = counts.others["labels"] - counts.others["none"]
    joined = records - counts.alone.total()
    for label, alone in counts.alone.items() if joined > 0 else ():
        name = unicodedata.normalize("NFC", preview.classes[label])
        words = re.sub(r"[\W_]+", " ", name.lower()).strip()
        is_named = any(each.fullmatch(words) for each in (_NOTHING, _UNKNOWN_CLASSES, _NO_OBJECTS))
        number = sum(preview.count(split, label) for split in counts.records)
        is_many = alone == number >= max(MIN_ALONE, MIN_ALONE_SHARE * records)
        is_odd = is_many and joined >= MIN_JOINED_SHARE * (records - number)
        if is_odd or (is_named and alone >= MOSTLY_ALONE * number):
            found[preview.classes[label]] = number
    return found


def find_labels_of_nothing(preview: Preview) -> Iterator[Remark]:
    """Find labels such as "No Finding" that stand alone where other labels stand together."""
    yield from (
        (
            "warning",
            f"label {quote(name)} ({number:,} records) stands alone in most of them, while other labels stand "
            "together, so a network has an output for it. If it means that a record has none of the labels, write an "
            "empty list, [], in its place; in columns of 1 and 0, leave its column out",
        )
        for name, number in _labels_of_nothing(preview).items()
    )


def find_identifiers(preview: Preview) -> Iterator[Remark]:
    """Find labels that differ for nearly every record, such as identifiers, dates and measurements."""
    if preview.source == "image_folder":  # somebody has made a folder for each
        return
    records = preview.counts.labeled.total()
    names = [name for label, name in enumerate(preview.classes) if preview.has_records(label)]
    if len(names) >= MIN_IDENTIFIERS and records < MIN_PER_CLASS * len(names):
        yield (
            "warning",
            f"nearly every record has its own class ({len(names):,} classes of {records:,} records, such as "
            f"{shorten(names, 3)}), as identifiers, dates and measurements have; if they are not classes, name another "
            "column, or none (data.label=null)",
        )


def find_quoted_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes whose names are in quotes."""
    names = [
        name
        for name in preview.classes
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'"
    ]
    if names and preview.source != "image_folder":
        yield (
            "error",
            f"the classes {shorten(names, 3)} are in quotes, as cells are with a blank before the quote; remove the "
            "blank",
        )


def find_mixed_numbers(preview: Preview) -> Iterator[Remark]:
    """Find the few names among classes that are numbers."""
    words = [name for name in preview.classes if to_number(name) is None]
    if words and len(preview.classes) >= 5 * len(words) and preview.data_classes is None:
        yield (
            "warning",
            f"all classes are numbers except {shorten(words, 3)}, so they are names and in the order of their text; if "
            "these are typing errors, correct them",
        )


def find_classes_like_splits(preview: Preview) -> Iterator[Remark]:
    """Find classes that are named like splits."""
    tokens = defaultdict(set)
    for name in preview.classes:
        if (match := _SPLIT_WORD.search(name.lower())) is not None:
            tokens[name.lower().replace(match[0], "", 1).strip(" _.-")].add(match[0])
    if any(len(words) > 1 for words in tokens.values()):
        names = [name for name in preview.classes if _SPLIT_WORD.search(name.lower())]
        yield (
            "error",
            f"the classes {shorten(names, 6)} are named like splits of the same data; name the folders of each split "
            "with data.splits, and move masks and other data away",
        )
    else:
        names = [name for name in preview.classes if known_split(name) is not None]
        if names and len(preview.classes) > len(names):
            yield (
                "warning",
                f"the classes {shorten(names, 3)} are named like splits; if they are, name them in data.splits",
            )


def find_unusual_splits(preview: Preview) -> Iterator[Remark]:
    """Find a missing training split, and several spellings of the validation split."""
    splits = sorted(preview.counts.records)
    if splits and all(split.lower() in _FLAGS for split in splits):
        first, last = splits[0], splits[-1]
        yield (
            "error",
            f"splits are named {shorten(splits, 2)}, which does not say which of them is {TRAIN}; name them: "
            f"'data.split_names={{{first}: test, {last}: {TRAIN}}}', or the other way around",
        )
    elif splits and TRAIN not in splits:
        yield (
            "warning",
            f"there is no split {TRAIN}, but {shorten(splits, 5)}; students train on it unless split= names another "
            "one. Splits are named by data.splits (folders), data.split_names (tables) or data.split (tars)",
        )
    elif splits == [TRAIN] and getattr(preview.data, "test_fraction", None) == 0:
        yield (
            "note",
            f"all {preview.num_records:,} records are for training, so nothing is left to evaluate on; "
            "data.test_fraction=0.2 draws a split test",
        )
    twins = [split for split in splits if split in ("val", "valid", "validation", "dev")]
    if len(twins) > 1:
        yield "warning", f"the splits {shorten(twins, 4)} are different ones here"


def find_shared_groups(preview: Preview) -> Iterator[Remark]:
    """Find many small groups, such as patients, some of which are in several splits."""
    groups = preview.groups
    if groups is None or not groups.shared or groups.groups < MIN_GROUPS:
        return
    columns = getattr(preview.data, "group", ())
    is_of_classes = len(columns) > 1 or getattr(preview.data, "label", None) in columns
    if groups.records <= MAX_SMALL_GROUP * groups.groups and not is_of_classes:
        yield (
            "warning",
            f"groups have records in several splits ({groups.shared:,} of {groups.groups:,}, such as "
            f"{shorten(groups.examples, 3)}); if a group is a patient, a video or a burst, results on one split are "
            "partly about pictures of another: "
            + (
                "correct data.split"
                if getattr(preview.data, "split", None) or not preview.splits.startswith("drawn")
                else "keep them whole with data.keep_groups=true"
            ),
        )


def find_blank_groups(preview: Preview) -> Iterator[Remark]:
    """Find records without a group among records with one."""
    blank = preview.num_records - preview.counts.others["groups"]
    if preview.groups is not None and blank:
        yield (
            "warning",
            f"records have no group ({blank:,} of {preview.num_records:,}, such as {quote(preview.groups.blank)}), so "
            "each of them is a group of its own: one patient's may be in several splits, and in the holdout and the "
            "training. Fill in their groups, or leave them out",
        )


# ---- labels ----------------------------------------------------------------------------------------


def _have_no_names(preview: Preview) -> bool:
    """Return whether the classes are the numbers up to the largest label, because nothing names them."""
    tally = preview.tally
    return bool(tally[NUMBERED] or tally[NUMBERED_TARS])


def find_label_gaps(preview: Preview) -> Iterator[Remark]:
    """Find numbers without records below the largest label."""
    gaps = [label for label in range(len(preview.classes)) if not preview.has_records(label)]
    if gaps and _have_no_names(preview):
        first = min((label for _, label in preview.counts.labeled), default=0)
        begins = f", as they begin at {first}" if gaps == list(range(first)) else ""
        yield (
            "error",
            f"labels are numbers up to {len(preview.classes) - 1}, but some have no records ({len(gaps):,}{begins}): "
            f"{shorten([str(gap) for gap in gaps], 5)}. A network would have an output for each. Labels count from 0; "
            "list the class names in a file and set data.classes to it",
        )


def find_signed_labels(preview: Preview) -> Iterator[Remark]:
    """Find a negative class that is written as -1, which means an unknown label here."""
    negative, example = preview.tally[UNLABELED_CELLS].get("-1", (0, ""))
    labels = {label for _, label in preview.counts.labeled}
    if labels == {1} and negative >= MIN_SIGNED_SHARE * preview.num_records:
        yield (
            "error",
            f"the only labels are 1 and -1 ({negative:,}, such as {example}), and -1 is read as unknown; if it is a "
            "class, write 0, or names of both",
        )


def find_missing_labels(preview: Preview) -> Iterator[Remark]:
    """Find records without a label."""
    unlabeled = preview.counts.unlabeled.total()
    if not unlabeled or not preview.num_records:
        return
    hints = []
    if preview.tally[UNLABELED_CELLS]:
        hints.append(f"their cells are {describe_items(preview.tally[UNLABELED_CELLS])}")
    if preview.tally[UNLABELED_MEMBERS]:
        hints.append(f"their other members are {describe_items(preview.tally[UNLABELED_MEMBERS])}")
    if preview.tally[JSON_KEYS]:
        keys = [key for key in preview.tally[JSON_KEYS] if key != REST]
        hints.append(f"keys of their .json are {shorten(keys, 10)} (data.label_key chooses one)")
    there = f"; {'; '.join(hints)}" if hints else ""
    if preview.source == "webdataset":
        there += ". Labels are read from the only .cls, and from data.label_key in .json"
    if unlabeled < preview.num_records:
        counts = ", ".join(
            f"{split} {count:,}" for split, count in sorted(preview.counts.unlabeled.items())
        )
        yield (
            "warning",
            f"records without a label: {unlabeled:,} of {preview.num_records:,} ({counts}){there}",
        )
    elif preview.classes or hints or _expects_labels(preview):
        level: Level = "error" if preview.classes else "warning"
        text = f", although {len(preview.classes):,} classes are named" if preview.classes else ""
        yield level, f"no record has a label ({unlabeled:,} records){text}{there}"


def _expects_labels(preview: Preview) -> bool:
    """Return whether the options name a place of labels, or the source reads them by itself."""
    options = (getattr(preview.data, name, None) for name in ("label", "labels", "label_key"))
    return any(option is not None for option in options)


def find_joined_labels(preview: Preview) -> Iterator[Remark]:
    """Find cells that look like several labels in one."""
    several = getattr(preview.data, "labels", None) is not None
    for separator, (count, example) in preview.tally[JOINED].items():
        if not several:
            column = getattr(preview.data, "label", "")
            yield (
                "error",
                f"cells of column {column} ({count:,} different ones, such as {quote(example)}) look like several "
                f"labels in one cell; read them as such with data.label=null data.labels={column}",
            )
        elif separator != " ":
            yield (
                "error",
                f"cells of labels ({count:,} different ones, such as {quote(example)}) contain {separator!r}, but "
                f"what it separates hardly occurs in other cells: set 'data.label_separator={separator}', or "
                "data.label_separator='' if cells are whole names",
            )
        else:
            yield (
                "warning",
                f"cells of labels ({count:,} different ones, such as {quote(example)}) contain blanks and are taken as "
                "whole names; data.label_separator=' ' separates them",
            )


def find_separators(preview: Preview) -> Iterator[Remark]:
    """Find the separator that was chosen for cells of several labels."""
    yield from (
        (
            "note",
            f"cells of labels are separated at {separator!r} ({count:,} different ones, such as {quote(example)}); "
            "data.label_separator sets another one, and '' keeps cells whole",
        )
        for separator, (count, example) in preview.tally[SEPARATED].items()
    )


def find_unknown_cells(preview: Preview) -> Iterator[Remark]:
    """Find words that were read as an unknown label."""
    words = {**preview.tally[UNKNOWN_CELLS], **preview.tally[UNKNOWN_LABELS]}
    if words:
        yield (
            "warning",
            f"labels taken as unknown: {describe_items(words)}; a word that data.classes lists is a class",
        )


def find_fractions(preview: Preview) -> Iterator[Remark]:
    """Find labels that are measurements rather than classes."""
    all_numbers = all(map(_NUMBER.fullmatch, preview.classes))
    fractions = [
        name for name in preview.classes if all_numbers and float(name.replace(",", ".")) % 1
    ]
    if fractions:
        yield (
            "error",
            f"all labels are numbers, and {len(fractions):,} of them have fractions ({shorten(fractions, 3)}), so each "
            "value is a class of its own; if they are measurements, set data.label=null, or name another column",
        )


def find_json_next_to_cls(preview: Preview) -> Iterator[Remark]:
    """Find .json members that were passed over because the record has a .cls."""
    if items := preview.tally[IGNORED_JSON]:
        yield (
            "warning",
            "a .json next to a .cls was skipped, because it has no boxes, labels and group of the form that is "
            f"read: {describe_items(items)}",
        )


def find_one_hot_labels(preview: Preview) -> Iterator[Remark]:
    """Find lists of labels that have a 0 or a 1 for each class."""
    one_hot, example = preview.tally[LABEL_LISTS].get("0 and 1", (0, ""))
    remedy = (
        'write a mapping, as in {"cat": 1, "dog": 0, "cow": null}'
        if preview.source == "webdataset"
        else "name the classes in data.classes=FILE, a line for each place of a list, or write those"
    )
    if one_hot and one_hot >= MIN_ONE_HOT_SHARE * preview.tally.total(LABEL_LISTS):
        yield (
            "error",
            f"lists of labels have a 0 or a 1 for each class, such as {quote(example)[1:-1]}, but lists are read as "
            f"the numbers or names of a record's classes; {remedy}",
        )


def find_constant_labels(preview: Preview) -> Iterator[Remark]:
    """Find labels that all records have that say anything of them, where records may have many."""
    counts = preview.counts
    labeled = counts.records.total() - counts.unlabeled.total()
    if not counts.others["labels"]:
        return
    names = [
        name
        for label, name in enumerate(preview.classes)
        if (has := sum(counts.labeled[split, label] for split in counts.records))
        and has == labeled - counts.unknown[label]
    ]
    if names:
        yield (
            "warning",
            f"labels that every record has of which they are known ({len(names):,}): {shorten(names, 5)}; there is "
            "nothing to tell apart, and no AUROC",
        )


def find_flag_column(preview: Preview) -> Iterator[Remark]:
    """Find a column of 1 and 0 that is read as one of names of classes."""
    labels = getattr(preview.data, "labels", None)
    counts = preview.counts
    labeled = counts.records.total() - counts.unlabeled.total() - counts.others["none"]
    is_single = counts.labeled.total() == labeled > 0
    if isinstance(labels, str) and is_single and set(preview.classes) == {"0", "1"}:
        yield (
            "error",
            f"column {labels} has only 0 and 1, which are read as the classes '0' and '1'; for a class of one column "
            f"set data.label={labels} and leave out data.labels, and for several list their columns: "
            f"'data.labels=[{labels},...]'",
        )


def find_boxes_of_other_labels(preview: Preview) -> Iterator[Remark]:
    """Find boxes of classes that their records do not have, or of which that is unknown."""
    if number := preview.counts.others["boxes of other labels"]:
        yield (
            "warning",
            f"records have boxes of classes that they do not have, or of which that is unknown ({number:,}); EPG and "
            "IoU leave these boxes out",
        )


def find_normalized_boxes(preview: Preview) -> Iterator[Remark]:
    """Find boxes in fractions of the image instead of pixels."""
    if list(preview.tally[BOXES]) == ["within 0 to 1"]:
        yield (
            "error",
            "all corners of boxes are within 0 to 1, but boxes are in pixels; multiply them by the width and height of "
            "their images",
        )
