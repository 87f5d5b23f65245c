"""The public functions besides those of the verbs: a store for a training loop of one's own, explanations, lists.

`permafrost` itself exports them, and imports them on first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor, nn

from permafrost.config.augment import AugmentOptions
from permafrost.config.builder import build_config
from permafrost.config.compose import compose
from permafrost.config.store import STORE_METHODS, SubsetOptions
from permafrost.core.errors import ConfigError, require
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.subset import (
    HOLDOUT,
    members_of_classes,
    select_holdout_rows,
    select_training_rows,
)
from permafrost.loading.target_sheet import sheets_of
from permafrost.models.classifier import Classifier
from permafrost.storage.addresses import is_address
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store
from permafrost.store.shard_records import shard_table

if TYPE_CHECKING:
    from permafrost.loading.store_samples import StoreSamples
    from permafrost.store.facts import FactSheet

# ---- a store -------------------------------------------------------------------------------------


class OpenStore(Store):
    """Finished store, its records and its teacher passes, for loops and tables of one's own."""

    def select(
        self,
        split: str = "train",
        *,
        shots: int | None = None,
        holdout: int = 0,
        seed: int = 0,
        rule: Literal["auto", "permutation", "by_key"] = "auto",
        classes: Sequence[str] = (),
        keys: Iterable[str] | None = None,
    ) -> SelectedRecords:
        """Select records of a split, as `distill` does with the options of `subset`.

        Args:
            split: Name of the split. "holdout" selects the records that the same options hold out of train, unless a
                split is called so.
            shots: Number of records of each class; None selects all.
            holdout: Number of records of each class that are held out first.
            seed: Seed of the selection, `subset.seed`.
            rule: Order in which the records of a class are selected, `subset.rule`.
            classes: Names of classes whose records are selected; () selects all.
            keys: Keys of the records that are selected; None selects all.

        Raises:
            ConfigError: If the store does not have such a split, class or key.
        """
        subset = SubsetOptions(shots=shots, holdout=holdout, seed=seed, rule=rule)
        if split == HOLDOUT and HOLDOUT not in self.shards.splits:
            require(
                holdout > 0,
                "select('holdout') needs the number of records of each class that are held out, as in "
                "select('holdout', holdout=10)",
            )
            rows: RowNumbers = select_holdout_rows(self.index, "train", subset)
        else:
            rows = select_training_rows(self.index, split, subset)
        require(
            not isinstance(classes, str),
            f"classes={classes!r} is a text; give a list of names, as in classes=[{classes!r}]",
        )
        if classes:
            rows = _rows_of_classes(self, rows, classes)
        if keys is not None:
            rows = _rows_of_keys(self, rows, keys, split)
        return SelectedRecords(self, rows)

    def table(
        self,
        split: str | None = None,
        *,
        teacher: str | None = None,
        fields: Sequence[str] | None = None,
    ) -> pa.Table:
        """Read keys, splits, labels and the outputs of a teacher as an Arrow table, a row per record.

        The table is in memory: 4 bytes per class and record for logits, and 4 per value of other fields, so name the
        fields of a large store. `.to_pandas()` and `arrays` convert.

        Args:
            split: Name of the split; None reads all splits.
            teacher: Name of a pass; None reads the only one.
            fields: Fields of the pass, in the canonical view and in the units of the network (a map times its scale).
                Each is a column of fixed-size lists with the values of a record in row-major order, float32 or the
                integers of classes. None reads all fields of the pass, and () no pass.

        Raises:
            ConfigError: If the store does not have such a split.
            StoreMismatchError: If the store does not have such a pass, or several and none is named.
        """
        if split is not None and split not in self.shards.splits:
            self.select(split)  # raises
        splits = list(self.shards.splits) if split is None else [split]
        numbers = np.concatenate(
            [self.shards.splits.get(name, np.empty(0, np.int64)) for name in splits]
        )
        reads_pass = fields is None or fields
        reader = self.open_passes([teacher] if teacher else ())[0] if reads_pass else None
        return pa.concat_tables(
            [shard_table(self, int(number), reader, fields) for number in np.sort(numbers)]
        )

    def facts(self, teacher: str | None = None) -> dict[str, FactSheet]:
        """Return the facts about the data and a pass, by subject: data, teacher, targets, machine.

        Args:
            teacher: Name of a pass; None takes the only one, and the data alone if there is none.

        Raises:
            StoreMismatchError: If the store does not have such a pass, or several and none is named.
        """
        passes = self.open_passes([teacher] if teacher else ()) if self.pass_folders() else []
        return sheets_of(self, passes[0] if passes else None)

    def __getattr__(self, name: str) -> Any:
        """Return a method that a package adds, such as `show`."""
        if name.startswith("_") or name not in STORE_METHODS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return partial(resolve_name(STORE_METHODS[name]), self)

    def arrays(
        self,
        split: str | None = None,
        *,
        teacher: str | None = None,
        fields: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Read the columns of `table` as NumPy arrays: key [n], label i32 [n], and each field [n, *shape].

        Records that the pass does not cover are left out. Arguments and errors are those of `table`.
        """
        table = self.table(split, teacher=teacher, fields=fields)
        shapes: dict[str, tuple[int, ...]] = {}
        if last := table.column_names[3:]:  # after key, split and label
            table = table.filter(pa.compute.is_valid(table[last[0]]))
            (reader,) = self.open_passes([teacher] if teacher else ())[:1]
            shapes = {spec.name: spec.shape for spec in reader.manifest.fields}
        return {
            name: table[name].combine_chunks().flatten().to_numpy().reshape(-1, *shapes[name])
            if name in shapes
            else table[name].to_numpy()
            for name in table.column_names
        }


def open_store(path: str | Path) -> OpenStore:
    """Open a finished store.

    Raises:
        UserError: If the folder contains none.

    Example:
        >>> opened = open_store(path)
        >>> len(opened.select("train", shots=1)), opened.table("train").column_names
        (10, ['key', 'split', 'label', 'logits', 'map', 'target_class'])
        >>> opened.arrays("train")["logits"].shape
        (40, 10)
    """
    # A program may change its folder afterwards.
    return OpenStore(path if is_address(str(path)) else Path(path).absolute())


def _rows_of_classes(store: Store, rows: RowNumbers, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return those of these rows that have one of the named classes."""
    names = list(store.manifest.classes)
    absent = [name for name in classes if name not in names]
    require(
        not absent, f"classes={absent} are not among those of {store.path}: {', '.join(names[:20])}"
    )
    chosen = np.array([names.index(name) for name in classes])
    row_numbers = np.asarray(rows)
    if store.index.has_many_labels:
        labels, lengths = store.index.label_lists(rows)
        groups = members_of_classes(labels, np.repeat(np.arange(len(row_numbers)), lengths))
        places = [groups[label] for label in chosen.tolist() if label in groups]
        return row_numbers[np.unique(np.concatenate(places))] if places else row_numbers[:0]
    return row_numbers[np.isin(store.index.values("label", rows), chosen)]


def _rows_of_keys(
    store: Store, rows: RowNumbers, keys: Iterable[str], split: str
) -> NDArray[np.int64]:
    """Return the rows that have one of the keys; all keys must be there."""
    wanted = set(keys)
    places = SelectedRecords(store, rows).positions_of(wanted)
    absent = sorted(wanted - places.keys())
    require(
        not absent,
        f"{len(absent)} of the {len(wanted)} keys are not selected in split {split} of {store.path}, "
        f"the first {absent[0] if absent else ''}; keys are those of the store's index",
    )
    return np.asarray(rows)[np.sort(np.fromiter(places.values(), np.int64, len(places)))]


def augmentation(name: str = "pad_crop_flip", **options: Any) -> AugmentOptions:
    """Return random views by the options of `augment=`.

    Args:
        name: none, pad_crop, pad_crop_flip, resized_crop_flip, or another of conf/augment.
        **options: Options of `augment`, such as size=224 or operations=[{"kind": "rotation", "degrees": 15}].

    Raises:
        ConfigError: If there is no such augmentation, or no such option or value.

    Example:
        >>> [operation.kind for operation in augmentation("pad_crop_flip").operations]
        ['pad_crop', 'horizontal_flip']
    """
    from permafrost.config.augment import AugmentOptions

    values = compose("distill", [f"augment={name}"])["augment"]
    return build_config(AugmentOptions, values | options, "augment")


def load_store(
    path: str | Path,
    split: str = "train",
    *,
    teacher: str | None = None,
    augment: AugmentOptions | str | None = None,
    seed: int = 0,
) -> StoreSamples:
    """Open a split of a store as a map-style dataset, for any DataLoader, sampler or trainer.

    `RecordLoader` reads the same records faster (docs/howto/own-loop.md).

    Args:
        path: Folder of the store.
        split: Name of the split.
        teacher: Name of a teacher pass; None reads the only one.
        augment: Random views, of `augmentation` or their name; None gives whole frames.
        seed: Seed of the views, which are a function of it, of the epoch (`set_epoch`) and of the number of the record.

    Raises:
        UserError: If there is no such store, split or pass.

    Example:
        >>> samples = load_store(path, augment="pad_crop_flip")
        >>> len(samples), samples[0].image.shape, samples[0].logits.shape
        (40, torch.Size([3, 16, 16]), torch.Size([10]))
    """
    from permafrost.loading.store_samples import StoreSamples

    return StoreSamples(
        open_store(path).select(split),
        teacher=teacher,
        augment=augmentation(augment) if isinstance(augment, str) else augment,
        seed=seed,
    )


# ---- networks ------------------------------------------------------------------------------------


class Explanation(NamedTuple):
    """Logits of images and the maps of their target classes, on the CPU."""

    logits: Tensor
    """f32 [N, K]."""
    target_class: Tensor
    """i64 [N, E]."""
    maps: Tensor
    """f32 [N, E, A, h, w], not normalized, on the network's own grid."""


def explain(
    network: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    layer: str | None = None,
    layout: str | None = None,
    target_class: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    explainer: str | None = None,
) -> Explanation:
    """Explain the logits of a network by GradCAM, or by the weights of a B-cos network.

    Equation of GradCAM: map = relu(sum_k alpha_k A_k), alpha_k = mean_ij dz_c / dA_k. `explainer` names others. The
    network is run in eval mode, and each of its modules returns to the mode that it had.

    Args:
        network: A network of permafrost, or any module from images to logits [B, K].
        images: f32 [N, 3, H, W] in the form that the network takes, or in [0, 1] with `mean` and `std`; or batches of
            them. They are converted to the dtype of its weights.
        layer: Name of the module whose output is explained, a grid or tokens, as in network.named_modules(). None takes
            the last one that the logits depend on, and logs its name.
        layout: Layout of its output, such as "b 1+hw c" for patches after a class token; None measures it.
        target_class: i64 [N, E], where -1 results in a zero map; None explains the class of the highest logit.
        mean: Mean of the network's normalization by channel; None subtracts nothing, as of a permafrost network, which
            normalizes by itself.
        std: Standard deviation by channel; None divides by nothing.
        batch_size: Number of images of a tensor that are computed at once.
        explainer: Explainer with its options, as in "integrated_gradients steps=8"; None is that of the network. Those
            at the pixels read the images as the network receives them, after mean and std.

    Raises:
        ConfigError: If no layer can be explained, if there are no images, or if images or classes have another form.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5))
        >>> explained = explain(network, torch.rand(6, 3, 16, 16), layer="1", batch_size=4)
        >>> explained.logits.shape, explained.maps.shape
        (torch.Size([6, 5]), torch.Size([6, 1, 1, 7, 7]))
    """
    import torch

    from permafrost.models.classifier import Classifier, Normalize, eval_mode
    from permafrost.models.explanations import explainer_named, forward_to_explain
    from permafrost.models.module import ModuleClassifier

    model = network
    if layer is not None or not isinstance(model, Classifier):
        model = ModuleClassifier(network, layer or "", layout=layout or "")
    explain_by = explainer_named(explainer or model.explainer_of_training or model.explainer)
    batches = torch.split(images, batch_size) if isinstance(images, torch.Tensor) else images
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    weights = next(
        (parameter for parameter in model.parameters() if parameter.is_floating_point()),
        torch.empty(0),
    )
    start = 0
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            require(
                batch.ndim == 4 and batch.is_floating_point(),
                f"explain: images are {batch.dtype} {[*batch.shape]} instead of floating point [N, 3, H, W]; "
                "divide pixels by 255, and give one image as image[None]",
            )
            values = {
                "mean": [0.0] * batch.shape[1] if mean is None else mean,
                "std": [1.0] * batch.shape[1] if std is None else std,
            }
            for name, numbers in values.items():
                require(
                    len(numbers) == batch.shape[1] and (name == "mean" or min(numbers) > 0),
                    f"explain: {name}={[*numbers]} must have a {'positive ' * (name == 'std')}number for each of the "
                    f"{batch.shape[1]} channels of the images",
                )
            normalize = Normalize(**values).to(weights)
            output = forward_to_explain(model, normalize(batch.to(weights)))
            rows = slice(start, start + len(batch))
            start += len(batch)
            if target_class is None:
                classes = output.logits.argmax(dim=1, keepdim=True)
            else:
                _check_target_class(target_class, output.logits.shape[1], at_least=start)
                classes = target_class[rows].to(weights.device)
            maps = explain_by(model, output, classes)
            parts.append((output.logits.detach().float().cpu(), classes.cpu(), maps.detach().cpu()))
    require(bool(parts), "explain: there are no images")
    require(
        target_class is None or len(target_class) == start,
        f"explain: target_class is of {0 if target_class is None else len(target_class)} images, but there "
        f"are {start}",
    )
    return Explanation(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _check_target_class(classes: Tensor, outputs: int, at_least: int) -> None:
    """Raise ConfigError unless classes are i64 [N, E], outputs of the network or -1, and N >= `at_least`."""
    require(
        classes.ndim == 2 and not (classes.is_floating_point() or classes.is_complex()),
        f"explain: target_class is {str(classes.dtype).removeprefix('torch.')} {[*classes.shape]} instead of int64 "
        "[N, E]; give one class an image as classes[:, None]",
    )
    require(
        len(classes) >= at_least,
        f"explain: target_class is of {len(classes)} images, but there are at least {at_least}",
    )
    wrong = classes[(classes < -1) | (classes >= outputs)]
    require(
        not len(wrong),
        f"explain: target_class has {wrong[:3].tolist()}, but the network's {outputs} outputs are 0 to "
        f"{outputs - 1}; -1 stands for no class, whose map is zero",
    )


def load_student(
    run: str | Path, *, network: nn.Module | None = None, plugins: Sequence[str] = ()
) -> Classifier:
    """Load the frozen network of a finished run, from images in [0, 1] to `ModelOutput`.

    Its attribute `picture` is what `permafrost evaluate` shows it of an image, for `RecordLoader(frame=...)`.

    Args:
        run: Name of a run below runs/, or the folder of a trained network.
        network: Module of the same architecture, for a run of `distill(student=module)`; the weights are loaded into a
            copy. Other verbs of this program then know the network of the run, too.
        plugins: Files and modules of your own that the network needs, as the option `plugins` names them.

    Raises:
        ConfigError: If it is neither, or if a plug-in cannot be imported.

    Example:
        >>> import torch
        >>> load_student(student)(torch.rand(4, 3, 16, 16)).logits.shape
        torch.Size([4, 10])
    """
    from permafrost.config.plugins import load_plugins
    from permafrost.models.saved import SavedNetwork
    from permafrost.runs.folder import RunFolder
    from permafrost.runs.mirrors import RUNS

    load_plugins(plugins)
    folders = [Path(run), RunFolder(str(run)).path]
    candidates = [*folders, *(path / verb for path in folders for verb in ("distill", "teach"))]
    folder = next((path for path in candidates if SavedNetwork(path).is_finished), None)
    if folder is None:
        raise ConfigError(f"{run} is neither a finished run of ./{RUNS} nor a folder of a network")
    if network is not None:
        SavedNetwork(folder).build_from(network)
    student, trained = SavedNetwork(folder).load()
    student.picture = trained.picture
    return student


# ---- lists ---------------------------------------------------------------------------------------


def list_methods() -> list[str]:
    """Return the losses of students, the values of `method=`, with those of plug-ins."""
    from permafrost.config.methods import METHODS

    return sorted(METHODS)


def list_networks(pattern: str = "*") -> list[str]:
    """Return networks as kind/name, such as torchvision/resnet18 for `student=torchvision student.name=resnet18`.

    Args:
        pattern: Pattern of the name, as in "resnet*".

    Example:
        >>> [name for name in list_networks("resnet1*") if name.startswith("torchvision")]
        ['torchvision/resnet101', 'torchvision/resnet152', 'torchvision/resnet18']
    """
    from permafrost.config.models import MODELS
    from permafrost.models.providers import names_of_kind

    names = [f"{kind}/{name}" for kind in MODELS for name in names_of_kind(kind)]
    return sorted(name for name in names if fnmatchcase(name.partition("/")[2], pattern))


def list_explainers() -> list[str]:
    """Return the functions from a network to its maps, the values of `explainer=`, with those of plug-ins."""
    from permafrost.config.explainers import EXPLAINERS

    return sorted(EXPLAINERS)


def list_evaluators() -> list[str]:
    """Return what measures a student, the names in `evaluators=`, with those of plug-ins."""
    from permafrost.config.evaluation import EVALUATORS

    return sorted(EVALUATORS)
