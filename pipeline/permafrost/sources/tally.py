"""Counts of what a source met while it listed its records, with examples, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_ITEMS = 1000
"""Largest number of items of a topic that are counted apart."""
BOXES = "boxes"
"""Topic of boxes: those whose corners are within 0 to 1, and all others."""
REST = "..."
"""Item that counts all others of a topic that is full."""


@dataclass
class Tally:
    """Counts by topic and item, each with its first example, mergeable over the parts of a source.

    A topic is a question that a finding asks, such as the suffixes of files that were left out.
    """

    topics: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)

    def add(self, topic: str, item: str, example: str = "", count: int = 1) -> None:
        """Count an item of a topic.

        Args:
            topic: The topic.
            item: The item; of a topic with many items, further ones are counted as REST.
            example: Example of the item, kept if it is the first one.
            count: Number to add.
        """
        items = self.topics.setdefault(topic, {})
        if item not in items and len(items) >= MAX_ITEMS:
            item = REST
        number, first = items.get(item, (0, example))
        items[item] = (number + count, first)

    def __getitem__(self, topic: str) -> Mapping[str, tuple[int, str]]:
        return self.topics.get(topic, {})

    def total(self, topic: str) -> int:
        """Return the count over all items of a topic."""
        return sum(count for count, _ in self[topic].values())

    def clear(self) -> None:
        """Forget everything, before the records are listed again."""
        self.topics.clear()

    def merge(self, tally: Tally) -> None:
        """Add the topics of another tally."""
        for topic, items in tally.topics.items():
            for item, (count, example) in items.items():
                self.add(topic, item, example, count)
