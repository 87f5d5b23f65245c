"""The frozen teacher: canonical frames in, stored fields out. Knows neither Ray nor disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.models import build_model, freeze
from pipeline.payloads import PAYLOADS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.config import ExplainerConfig, ModelConfig, PassConfig
    from pipeline.models.output import ModelOutput
    from pipeline.payloads.payload import Encoded
    from pipeline.records import FieldSpec


class FidelityError(UserError, ValueError):
    """A stored form too far from the values it stands for."""


class NotFiniteError(UserError, ValueError):
    """A teacher that says nothing usable about a record."""


class TeacherAnnotator:
    """One teacher and what it is asked for; one forward pass serves every payload."""

    def __init__(
        self, teacher: ModelConfig, num_classes: int, explainer: ExplainerConfig, config: PassConfig
    ) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = freeze(build_model(teacher, num_classes)).to(self.device)
        self.payloads = [PAYLOADS[name](config, explainer) for name in config.payloads]

    def fields(self, size: tuple[int, int]) -> list[FieldSpec]:
        """The fields this pass stores for frames of (height, width) `size`."""
        output = self._forward(torch.zeros(1, 3, *size, dtype=torch.uint8))
        return [spec for payload in self.payloads for spec in payload.fields(self.model, output)]

    def annotate(
        self, frames: Tensor, keys: list[str]
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, float]]:
        """Fields [n, V = 1, *shape] of canonical frames u8 [n, 3, H, W], and their fidelity.

        Batches are cut at fixed positions, so that the values do not depend on who computes them.
        """
        encoded = [
            self._annotate_batch(frames[start : start + self.config.batch_size], keys[start:])
            for start in range(0, len(frames), self.config.batch_size)
        ]
        values = {
            name: np.concatenate([batch.values[name] for batch in encoded])[:, None]
            for name in encoded[0].values
        }
        fidelity = {
            name: min(batch.fidelity[name] for batch in encoded) for name in encoded[0].fidelity
        }
        for name, cosine in fidelity.items():
            if cosine < self.config.min_fidelity:
                raise FidelityError(
                    f"field {name} stored as {values[name].dtype} has cosine {cosine:.6f} to its values, "
                    f"below annotate.min_fidelity={self.config.min_fidelity}; store it in a wider type"
                )
        return values, fidelity

    def _annotate_batch(self, frames: Tensor, keys: list[str]) -> Encoded:
        output = self._forward(frames)
        finite = output.logits.isfinite().all(dim=1)
        if not finite.all():
            key = keys[int((~finite).nonzero()[0])]
            raise NotFiniteError(
                f"the teacher's logits of record {key} are not finite; check teacher.weights and that image"
            )
        encoded = [payload.encode(self.model, output) for payload in self.payloads]
        stored = encoded[self.config.payloads.index("logits")].values["logits"]
        if not np.isfinite(stored).all():
            key = keys[int((~np.isfinite(stored).all(axis=1)).nonzero()[0][0])]
            raise NotFiniteError(
                f"the teacher's logits of record {key} exceed what {stored.dtype} can hold"
            )
        return type(encoded[0])(
            {name: array for part in encoded for name, array in part.values.items()},
            {name: cosine for part in encoded for name, cosine in part.fidelity.items()},
        )

    @torch.no_grad()
    def _forward(self, frames: Tensor) -> ModelOutput:
        return self.model(frames.to(self.device).float() / 255)
