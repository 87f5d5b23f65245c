"""e2KD (Parchami-Araghi et al. 2024): the student should say what the teacher says, for the same reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config.methods import E2KDConfig
from pipeline.core.records import Guidance, Targets
from pipeline.losses.base import Needs, StudentOutput, Term, TermValue
from pipeline.losses.kd import KDLoss
from pipeline.losses.map_cosine import map_cosine


class E2KDLoss(KDLoss):
    """lambda_ce * ce + lambda_kd * kd + lambda_map * (1 - cosine of the maps) (eq. 3).

    Pairs in which either map is zero add nothing; the authors' code counts 1 for each, a constant, so that its logged
    value is higher by 1 / N a record with a zero map and its gradient the same.

    A record's term is the mean over its E_n classes, and the batch's the mean over its N records, so that a record
    weighs the same however many classes it has:

        1 / N sum_n 1 / E_n sum_e (1 - cosine)    over valid pairs

    `normalize_by` says who counts in N and E_n: "batch" every record and every class that the teacher
    explains (the paper's lambda), "valid" those with valid pairs only. Padding never counts.
    """

    config: E2KDConfig

    @property
    def needs(self) -> Needs:
        config = self.config
        return replace(
            super().needs,
            maps_every=config.guided_step_interval if config.lambda_map > 0 else None,
            map_control=config.map_control,
        )

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        assert isinstance(targets, Targets)
        yield from super().terms(student, targets, labels)
        if (maps := student.maps) is not None:
            yield Term(
                "map",
                self.config.lambda_map,
                lambda: self._map_distance(maps, targets, student.input_size),
            )

    def _map_distance(
        self, maps: Tensor, targets: Targets, input_size: tuple[int, int]
    ) -> TermValue:
        assert targets.explained_class is not None
        assert targets.maps is not None
        assert targets.map_valid is not None
        cosine, nonzero = map_cosine(maps, targets.maps, input_size)
        explained = targets.explained_class >= 0
        valid = nonzero & targets.map_valid
        counted = valid if self.config.normalize_by == "valid" else explained
        distance = torch.where(valid, 1 - cosine, 0.0).sum(dim=1)  # [B]
        of_records = distance / counted.sum(dim=1).clamp(min=1)
        count = torch.tensor(len(valid))
        if self.config.normalize_by == "valid":
            count = valid.any(dim=1).sum()
        fraction = valid.sum() / explained.sum().clamp(min=1)
        return TermValue(of_records.sum() / count.clamp(min=1), {"valid_map_fraction": fraction})
