"""e2KD: soft targets, and the cosine of the student's explanations with the teacher's.

e2KD compares bilinearly upsampled maps (eq. 3). Upsampling is linear, u(a) = U_h a U_w', so the inner product of two
upsampled maps is <a, G_h b G_w> with the small Gram matrices G = U' U. No tensor of the input's size is created.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.methods import E2KDConfig
from permafrost.core.batches import Guidance, Targets
from permafrost.losses.base import Needs, StudentOutput, Term, TermValue
from permafrost.losses.feature_kd import CLASS_MAP_NEEDS, check_resolution, class_map_loss
from permafrost.losses.kd import KDLoss

_TINY = torch.finfo(torch.float32).tiny


def map_cosine(
    student_maps: Tensor, teacher_maps: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute the cosine of each pair of maps at (height, width) `size`, and its validity.

    A pair is valid if neither map is zero.

    student_maps, teacher_maps  [B, E, A, h, w], on the same grid, of any positive scale
    returns                     [B, E] (0 where invalid, without a gradient) and bool [B, E]

    >>> import torch
    >>> maps = torch.eye(4).reshape(1, 1, 1, 4, 4)
    >>> cosine, valid = map_cosine(3 * maps, maps, size=(32, 32))
    >>> round(cosine.item(), 5), valid.item(), map_cosine(0 * maps, maps, size=(32, 32))[1].item()
    (1.0, True, False)
    """
    student = _unit_scale(student_maps)
    teacher = _unit_scale(teacher_maps.detach()).to(student.dtype)
    h, w = student.shape[-2:]
    grams = []
    if (h, w) != size:  # maps at the input's resolution are compared as they are
        grams = [
            _gram_on_device(n, full, student.device, student.dtype)
            for n, full in ((h, size[0]), (w, size[1]))
        ]
    product = _inner(student, teacher, grams)
    squared_norms = _inner(student, student, grams) * _inner(teacher, teacher, grams)
    valid = squared_norms != 0  # nan counts as valid, so that it appears in the loss
    # The double `where` keeps an invalid pair from back-propagating 0 * infinity through the root.
    norms = torch.where(valid, squared_norms, 1.0).sqrt()
    return torch.where(valid, product / norms, 0.0), valid


@lru_cache(maxsize=64)
def upsampling_gram(n: int, full: int) -> Tensor:
    """Compute U' U, [n, n] float64, of the bilinear upsampling U [full, n] (half-pixel centers)."""
    upsampled = F.interpolate(
        torch.eye(n, dtype=torch.float64)[None], size=full, mode="linear", align_corners=False
    )[0].T
    return upsampled.T @ upsampled


@lru_cache(maxsize=64)
def _gram_on_device(n: int, full: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cached copy of `upsampling_gram` on the device, because a copy in every step would synchronize with it."""
    return upsampling_gram(n, full).to(device, dtype)


def _unit_scale(maps: Tensor) -> Tensor:
    """Divide each map by its maximum absolute value, a constant, in float32 or wider so that norms stay in range."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    scale = maps.detach().abs().amax(dim=(2, 3, 4), keepdim=True)
    return maps / scale.clamp(min=_TINY)


def _inner(a: Tensor, b: Tensor, grams: list[Tensor]) -> Tensor:
    weighted = grams[0] @ b @ grams[1] if grams else b
    return (a * weighted).sum(dim=(2, 3, 4))


# ---- e2kd ------------------------------------------------------------------------------------------


class E2KDLoss(KDLoss):
    """Loss lambda_ce * ce + lambda_kd * kd + lambda_map * (1 - cosine of the maps) (eq. 3) + lambda_cat * CAT-KD's.

    Pairs in which either map is zero contribute 0. The authors' code counts 1 for each of them, a constant, so its
    logged value is higher by 1 / N per record with a zero map, with the same gradient.

    The term of a record is the mean over its E_n classes, and that of the batch is the mean over its N records, so the
    weight of a record does not depend on its number of classes:

        1 / N sum_n 1 / E_n sum_e (1 - cosine)    over valid pairs

    `normalize_by` defines N and E_n: "batch" counts every record and every class that the teacher explains (the
    paper's lambda), "valid" counts only those with valid pairs. Padding is never counted.
    """

    config: E2KDConfig

    @property
    def needs(self) -> Needs:
        config = self.config
        own = CLASS_MAP_NEEDS if config.lambda_cat > 0 else Needs()
        return replace(
            own,
            labels=super().needs.labels,
            maps_every=config.guided_step_interval if config.lambda_map > 0 else None,
            map_control=config.map_control,
            max_classes=config.max_classes,
        )

    def build(self, student: StudentOutput, targets: Targets) -> None:
        if self.config.lambda_cat > 0:
            check_resolution(self.config.resolution, targets)

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
        yield Term(
            "cat", self.config.lambda_cat, lambda: self._class_map_distance(student, targets)
        )

    def _class_map_distance(self, student: StudentOutput, targets: Targets) -> Tensor:
        assert student.output.class_maps is not None
        return class_map_loss(
            student.output.class_maps,
            targets.intermediates["class_maps"],
            self.config.resolution,
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
