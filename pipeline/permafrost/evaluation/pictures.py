"""Pictures of a few records with the network's maps and the teacher's stored maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from permafrost.core.labels import classes_of, has_many, predict_labels
from permafrost.core.records import Batch, StoredTargets
from permafrost.evaluation.forward import EvaluatedModel, attribution_of, bcos_input, maps_of
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import evaluation_view, view_images, view_maps
from permafrost.loading.transfer import move_batch
from permafrost.models.explainers.bcos_weights import color_picture, is_bcos_weights
from permafrost.models.explainers.explain import forward_to_explain

PICTURES_NAME = "pictures.safetensors"


@torch.no_grad()
def picture_maps(
    model: EvaluatedModel, dataset: StoreDataset, positions: list[int], frame: str = "auto"
) -> dict[str, Tensor]:
    """Run `explained_pictures` for the label of each record, in the evaluation view.

    If a record has many labels, the class is the first that the teacher explains, or the lowest if it explains none.
    """
    batch = move_batch(dataset.__getitems__(positions), model.device)
    batch = evaluation_view(batch, frame, model.input_size)
    return explained_pictures(model, batch, _pictured_classes(batch))


@torch.no_grad()
def explained_pictures(model: EvaluatedModel, batch: Batch, classes: Tensor) -> dict[str, Tensor]:
    """Images of the batch with the model's and the teacher's predictions and maps, on the CPU.

    frames               u8 [n, 3, H, W], in the batch's view
    labels, predictions  in the form of the labels
    maps                 f32 [n, h, w], for a B-cos network its contributions
    colors               B-cos networks only: the weights as RGBA, u8 [n, h, w, 4]
    teacher_*            the same for the stored maps, if there are any: those of the class, or of the class that
                         the teacher explains first
    teacher_classes      i64 [n]: the class of each stored map

    classes  i64 [n], classes that the model explains. A negative value selects the predicted class
    """
    images = view_images(batch, model.input_size)
    output = forward_to_explain(model.network, images)
    many = has_many(batch.labels)
    pictures = {
        "frames": (images * 255).round().to(torch.uint8),
        "labels": batch.labels,
        "predictions": predict_labels(output.logits, many=many),
        **_shown(maps_of(model, output, classes), batch),
    }
    if batch.targets and batch.targets[0].maps is not None:
        chosen, explained = select_class_maps(batch.targets[0], classes)
        shown = _shown(stored_maps(batch, chosen), batch)
        pictures |= {f"teacher_{name}": tensor for name, tensor in shown.items()}
        pictures["teacher_classes"] = explained
        pictures["teacher_predictions"] = predict_labels(chosen.logits, many=many)
    return {name: tensor.cpu().contiguous() for name, tensor in pictures.items()}


def select_class_maps(stored: StoredTargets, classes: Tensor) -> tuple[StoredTargets, Tensor]:
    """Return the stored targets reduced to one map per record, and the class [n] of that map.

    The map is that of the record's class in `classes` [n] if the teacher explains it, the first one otherwise.
    """
    assert stored.maps is not None
    assert stored.explained_class is not None
    place = (stored.explained_class == classes[:, None]).int().argmax(dim=1, keepdim=True)
    one = replace(
        stored,
        maps=stored.maps.take_along_dim(place[:, :, None, None, None], dim=1),
        explained_class=stored.explained_class.gather(1, place),
    )
    return one, stored.explained_class.gather(1, place)[:, 0]


def stored_maps(batch: Batch, stored: StoredTargets) -> Tensor:
    """Transform the stored maps to the batch's view, on their own grid."""
    assert stored.maps is not None
    return view_maps(batch, stored, (stored.maps.shape[-2], stored.maps.shape[-1]))


def _shown(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    shown = {"maps": attribution_of(maps, batch)}
    if is_bcos_weights(maps):
        colors = color_picture(maps, bcos_input(batch, maps))[:, 0]
        shown["colors"] = (colors * 255).round().to(torch.uint8)
    return shown


def _pictured_classes(batch: Batch) -> Tensor:
    """Classes [n] to explain, negative where unknown."""
    own = classes_of(batch.labels)[:, 0]
    explained = batch.targets[0].explained_class if batch.targets else None
    if explained is None or not has_many(batch.labels):
        return own
    return torch.where(explained[:, 0] >= 0, explained[:, 0], own)
