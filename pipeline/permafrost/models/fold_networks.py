"""Networks of several folds as one teacher: a record gets the outputs of the network that was trained without it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from permafrost.config.models import FoldsModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Classifier, Head, Provider
from permafrost.models.providers import provider_of, published


def digests_of_keys(keys: Sequence[str]) -> NDArray[np.int64]:
    """Compute the digest of each key by which the network of its record is found: i64 [n]."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


class FoldsClassifier(Classifier):
    """Networks of K folds, and the fold of each record that they were trained on.

    A teacher's annotator runs the network of each record. There is no single forward pass.
    """

    def __init__(self, networks: Sequence[Classifier], records: int) -> None:
        """Take the networks, whose weights and whose records are loaded as those of one network.

        Args:
            networks: Network of each fold, trained on the records of the other folds.
            records: Number of records of all folds.
        """
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.register_buffer("digests", torch.zeros(records, dtype=torch.int64))
        self.register_buffer("folds", torch.zeros(records, dtype=torch.uint8))

    def set_folds(self, digests: NDArray[np.int64], folds: NDArray[np.integer]) -> None:
        """Set the fold of each record.

        Args:
            digests: Result of `digests_of_keys` for the records of all folds, [records].
            folds: Fold of each of them, from 0.
        """
        order = np.argsort(digests)
        self.digests = torch.from_numpy(digests[order])
        self.folds = torch.from_numpy(folds[order].astype(np.uint8))

    @cached_property
    def _table(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        digests, folds = self.get_buffer("digests"), self.get_buffer("folds")
        return digests.cpu().numpy(), folds.cpu().numpy()

    def folds_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the fold of each record, i64 [n], whose network was not trained on it.

        A record of no fold, such as one of another split or an appended one, gets that of its key's digest modulo K.
        """
        digests, folds = self._table
        asked = digests_of_keys(keys)
        places = np.searchsorted(digests, asked).clip(max=len(digests) - 1)
        others = asked % len(self.networks)
        return np.where(digests[places] == asked, folds[places], others).astype(np.int64)

    @property
    def network(self) -> nn.Module:
        """All networks and the folds, whose state is one file of weights."""
        return self

    @property
    def one_network(self) -> Classifier:
        """Network of the first fold."""
        first = self.networks[0]
        assert isinstance(first, Classifier)
        return first

    @property
    def head(self) -> Head | None:
        """Closed form of the head of each network."""
        return self.one_network.head

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Refuse to run records whose keys, and so whose folds, are not known.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"teacher=folds are {len(self.networks)} networks, one for each record by its key, and run in precompute "
            "only; name the network of one fold in place of them, as in teacher=saved "
            "teacher.weights=runs/<run>/teach/fold-0"
        )

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Compute logits by the head of the first fold."""
        return self.one_network.forward_head(features, context)


def _build(config: FoldsModelConfig, outputs: int) -> Classifier:
    assert config.network is not None
    provider = provider_of(config.network)
    networks = [provider.build(config.network, outputs) for _ in range(config.folds)]
    return FoldsClassifier(networks, config.records)


PROVIDER = Provider(_build, lambda config: config.network and published(config.network))
