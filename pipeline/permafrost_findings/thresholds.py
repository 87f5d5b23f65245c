"""Thresholds of all rules of findings, by their subject. Those of the targets are in loading/target_sheet.py."""

from __future__ import annotations

# ---- labels and groups ---------------------------------------------------------------------------

MOSTLY_ALONE, MIN_ALONE, MIN_ALONE_SHARE, MIN_JOINED_SHARE = 0.5, 20, 0.1, 0.3
"""Least fraction of the records of a label with such a name that have no other label; of a label without such a name
that never stands with another one: fewest records, their least fraction of all, and that of others with several."""
MIN_IDENTIFIERS, MIN_PER_CLASS = 20, 1.5
"""Least number of classes, and of labeled records per class, below which labels are taken for identifiers."""
MIN_GROUPS, MAX_SMALL_GROUP = 8, 50
"""Least number of groups, and largest number of records of a group, that are taken for patients or videos."""
MIN_SIGNED_SHARE = 0.1
"""Minimum fraction of records labeled -1 for it not to be taken as unknown if the only other label is 1."""
MIN_ONE_HOT_SHARE = 0.9
"""Minimum fraction of label lists with a 0 or 1 for each class to take them for one-hot rows."""

# ---- folders and files ---------------------------------------------------------------------------

MIN_LEFT_OUT_SHARE, MIN_LEFT_OUT = 0.1, 3
"""Minimum fraction and number of left-out pictures for an error."""
MIN_REPEATING_SHARE = 0.5
"""Minimum fraction of repeating folders inside of class folders for a warning about their structure."""

# ---- pictures ------------------------------------------------------------------------------------

MIN_SHARE_OF_MOST, MAX_SHARE_OF_FEW = 0.9, 0.05
"""Fractions of a sample that count as nearly all and as nearly none."""
MIN_TRAIT_FILES = 8
"""Minimum number of files of a class or split for a trait that all of them share not to be a coincidence."""
MIN_FILES = 4
"""Minimum number of files for an error that affects all of them, and of a class or split for their median."""
MIN_FEWER_BITS = 2
"""Bits that make an image of 16 bits darker to the eye: a quarter of the values."""
MIN_BRIGHTNESS_EFFECT, MIN_BRIGHTNESS_ERRORS, MIN_BRIGHTNESS_FILES = 0.5, 4.0, 16
"""Least difference of mean brightness, in standard deviations of images and in its own standard errors, and number of
images on either side."""
MAX_SIDE_RATIO = 2.0
"""Median ratio of the longer to the shorter side from which whole pictures are squeezed a lot."""

# ---- equal and similar images --------------------------------------------------------------------

MIN_COPIES_SHARE, MOSTLY_COPIES_SHARE = 0.01, 0.5
"""Minimum fractions of all records for a note and a warning about copies."""
MIN_EQUAL_SHARE = 0.001
"""Fraction of the records of a split, or of all, below which pairs are a note."""
MIN_SIMILAR_SHARE = 0.01
"""Fraction of the records of a split from which similar images are a finding."""
MAX_BITS, MAX_MEAN_DIFFERENCE, MIN_CONTRAST = 6, 3.0, 8.0
"""Similar thumbnails: most bits of their hashes that differ, largest mean difference of their values apart from
brightness, and least standard deviation of these, as flat images resemble one another."""
