"""e2KD: soft targets, and the cosine of the student's explanations with the teacher's (map_distances.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from permafrost.config.methods import E2KDConfig
from permafrost.core.batches import AnyLabels, MapTargets, MixedMapTargets, Targets, require_maps
from permafrost.losses.base import Needs, StudentOutput, Term, TermValue
from permafrost.losses.feature_kd import CLASS_MAP_NEEDS, check_resolution, class_map_loss
from permafrost.losses.kd import KDLoss
from permafrost.losses.map_distances import map_cosine, map_error


class E2KDLoss(KDLoss):
    """Loss lambda_ce * ce + lambda_kd * kd + lambda_map * (1 - cosine of the maps) (eq. 3) + lambda_cat * CAT-KD's.

    With `map_distance=absolute`, |s - t|^2 / (2 |t|^2) takes the place of 1 - cosine, which compares the size, too.

    Pairs in which either map is zero contribute 0. The authors' code counts 1 for each of them, a constant, so its
    logged value is higher by 1 / N per record with a zero map, with the same gradient.

    A record's term is the mean over its E_n classes, and a batch's term is the mean over its N records, so the
    weight of a record does not depend on its number of classes:

        1 / N sum_n 1 / E_n sum_e (1 - cosine)    over valid pairs

    `normalize_by` defines N and E_n: "batch" counts every record and every class that the teacher explains (the
    paper's lambda), "valid" counts only those with valid pairs. Padding is never counted. Of a mixture of two records,
    the mean is over the classes of both with the weights `Targets.class_weights`, on the cells of each
    (`Targets.cell_weights`).
    """

    config: E2KDConfig

    @property
    def needs(self) -> Needs:
        config = self.config
        return replace(
            CLASS_MAP_NEEDS if config.lambda_cat > 0 else Needs(),
            labels=config.lambda_ce > 0,
            logits=config.lambda_kd > 0,
            maps_every=config.guided_step_interval if config.lambda_map > 0 else None,
            map_control=config.map_control,
            scaled_maps=config.map_distance == "absolute",
            explainer=config.explainer,
            max_classes=config.max_classes,
            second_maps=config.second_maps,
        )

    def build(self, student: StudentOutput, targets: Targets) -> None:
        if self.config.lambda_cat > 0:
            check_resolution(self.config.resolution, targets)

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield from super().terms(student, targets, labels)
        if (maps := student.maps) is not None:
            yield Term(
                "map",
                self.config.lambda_map,
                lambda: self._map_distance(maps, require_maps(targets), student.input_size),
            )
        yield Term(
            "cat",
            self.config.lambda_cat,
            lambda: class_map_loss(
                student.output.require("class_maps"),
                targets.intermediates["class_maps"],
                self.config.resolution,
            ),
        )

    def _map_distance(
        self, maps: Tensor, targets: MapTargets, input_size: tuple[int, int]
    ) -> TermValue:
        pair, explained = (maps, targets.maps), targets.target_class >= 0
        if isinstance(targets, MixedMapTargets):
            cells, weights = targets.cell_weights, targets.class_weights
            pair = (maps * cells, targets.maps * cells)
        else:
            weights = explained / explained.sum(dim=1, keepdim=True).clamp(min=1)
        if self.config.map_distance == "absolute":
            distance, nonzero = map_error(*pair, input_size)
        else:
            cosine, nonzero = map_cosine(*pair, input_size)
            distance = 1 - cosine
        valid = nonzero & targets.map_valid
        of_records = (weights * torch.where(valid, distance, 0.0)).sum(dim=1)  # [B]
        count = torch.tensor(len(valid))
        if self.config.normalize_by == "valid":
            counted = (weights * valid).sum(dim=1)
            of_records = of_records * weights.sum(dim=1) / torch.where(counted > 0, counted, 1.0)
            count = valid.any(dim=1).sum()
        fraction = valid.sum() / explained.sum().clamp(min=1)
        return TermValue(of_records.sum() / count.clamp(min=1), {"valid_map_fraction": fraction})
