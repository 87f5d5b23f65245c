"""The check that views of a pass are those that a student asks for."""

from __future__ import annotations

from permafrost.config.augment import AugmentOptions, describe_operations
from permafrost.core.errors import require
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import TeacherPass


def check_replayed(augment: AugmentOptions, teacher: TeacherPass) -> None:
    """Check that the views of a pass have the changes of pixels that the options ask for, in their order.

    Replayed views are those of the pass. Their geometry may differ from augment.operations, which an experiment sets
    for its other variants, too.

    Raises:
        StoreMismatchError: If they lack one, or are mixtures that the options do not fit.
    """
    require(
        not augment.scaled_decoding,
        f"augment.scaled_decoding=true: replayed views have the pixels of {teacher.name}; leave it out",
        StoreMismatchError,
    )
    if teacher.views.get("mix"):
        unfit = {
            "augment.mix would mix again; set augment.mix=[]": augment.mixes,
            "maps: blank would blank for both records; set maps: keep": augment.blanks_maps,
        }
        for reason in (reason for reason, is_set in unfit.items() if is_set):
            raise StoreMismatchError(
                f"the stored views of {teacher.name} are mixtures, which {reason}, or name a pass without views.mix"
            )
    stored = [
        operation
        for operation in teacher.manifest.views.get("operations", [])
        if isinstance(operation, dict)
    ]
    rest = iter(stored)
    for operation in describe_operations(
        [operation for operation in augment.on_pixels if operation.is_drawn]
    ):
        if operation not in rest:  # which takes what comes before it
            kinds = ", ".join(str(operation.get("kind")) for operation in stored)
            raise StoreMismatchError(
                f"augment.operations has {operation}, which the stored views of {teacher.name} do not have in this "
                f"order ({kinds or 'they change no pixels'}). Replayed views have the pixels that the teacher saw, so "
                "leave the operation out"
            )
