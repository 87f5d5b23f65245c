"""What a payload takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.records import FieldSpec
from pipeline.models.classifier import Classifier
from pipeline.models.output import Intermediates, ModelOutput


class BatchInfo(NamedTuple):
    """What the index says of the n records of a batch."""

    keys: Sequence[str]
    labels: Tensor
    """As of Batch."""


class EncodedFields(NamedTuple):
    """One payload of a batch of n records, as stored."""

    values: dict[str, NDArray[np.generic]]
    """field -> [n, *shape] of its FieldSpec."""
    fidelity: dict[str, float]
    """Of each lossy field: the lowest cosine between a record's values and their stored form."""


class Payload(Protocol):
    """One kind of thing that a teacher says about an input."""

    @property
    def intermediates(self) -> Intermediates:
        """What it reads of a forward pass beside logits and features."""

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        """The fields it stores, given an example output."""

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        """The fields' values for a batch; of each record they depend on that record alone."""
