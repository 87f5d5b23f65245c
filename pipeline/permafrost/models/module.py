"""Networks of one's own: any module from images to logits, explained at a layer that is named or at its last grid.

A forward hook reads the layer's output, so the network needs no base class and no division into trunk and head. The
network continues with a copy of what was read, so operations in place, before or after, do not change the features.

The first pass examines a copy of the network: which axes of the layer's output, or which of its tokens, are the image's
(layouts.py), and what follows the layer. Without a layer that fits it has logits and an embedding.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from permafrost.config.models import ModuleConfig, NetworkReturns, is_published
from permafrost.config.plugins import resolve_factory
from permafrost.core.errors import ConfigError, UserError, first_line, require
from permafrost.core.progress import log_once
from permafrost.core.records import IMPOSSIBLE_LOGIT
from permafrost.models.classifier import (
    NO_INTERMEDIATES,
    Classifier,
    GapLinear,
    GapNormLinear,
    Head,
    Intermediates,
    ModelOutput,
    Normalize,
    ProbedClassifier,
    Provider,
    Stage,
    apply_norm,
    eval_mode,
    nearly_equal,
    to_float32,
    trial_copy,
)
from permafrost.models.compute import exact_float32
from permafrost.models.image_places import (
    CORNERS,
    describe_wrong_places,
    read_input,
    replaced_parts,
)
from permafrost.models.layouts import (
    LayerGrid,
    Layout,
    Shape,
    describe_output,
    grid_layout,
    is_attention,
    layer_grids,
    stage_ends,
    tensors_of,
    token_layouts,
    watched,
)
from permafrost.models.providers import model_normalization
from permafrost.models.record_independence import require_independent_records, require_no_memory

logger = logging.getLogger("permafrost.models")

_MIN_PROBABILITY = torch.finfo(torch.float32).tiny
_SAME_LOGITS = 1e-3
"""Largest difference of two passes of the same images, in units of the largest logit."""


_PROBES = len(CORNERS) + 3
"""Number of images on which a network is examined."""
_MAX_TRIED = 3
"""Maximum number of layers that are examined if none is named."""
_REMEDIES = {
    r"required positional|required keyword": "it takes more than images, so wrap it in a module that adds the rest",
    r"same device": "let it keep its tensors as buffers, or create them on the device of the images",
    r"same dtype|scalar type": "let it create tensors of the precision of the images",
    r"\.grad\(\)|use_reentrant": "its activation checkpointing needs use_reentrant=False",
    r"size|shape|channel|dimension|divisible": "correct the size and channels of the images "
    "(input_size=, augment.size=)",
}
"""Remedies by what the errors of a network say."""
_OWN = "its own code raises this"
_NO_LAYERS: Mapping[str, Layout] = {}

AnyResult = TypeVar("AnyResult")


class _LayerRead(BaseException):
    """Signal that ends a forward pass at the layer, past what handles errors in the network."""


class ModuleClassifier(ProbedClassifier):
    """Any module from images to logits [B, K], whose features are the output of one of its layers.

    The output of the layer is a grid or its tokens, laid out by `layout`. The maps of a network whose logits are a
    linear layer on the average of the features, with or without a layer norm, have a closed form, which is found by
    running the rest of the network on random features. Otherwise the gradient with respect to the features is
    computed: for a student in the graph of its step, for a frozen network by running it again on the same images with
    the features in the layer's place.

    The first forward pass examines the network (`_probe`), and raises ConfigError if it cannot be run. If no layer can
    be explained, `no_grid` says why.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        normalize: Normalize | None = None,
        returns: NetworkReturns = "logits",
        *,
        layout: str = "",
        may_initialize: bool = False,
    ) -> None:
        """Open the wrappers of a network.

        Args:
            network: Module from images to logits [B, K].
            layer: Name of the module that is explained, as in network.named_modules(); empty takes the last one whose
                output is a grid.
            normalize: Normalization of the images, None for none.
            returns: What the network returns; this module returns the logits in it.
            layout: Layout of the layer's output as text (Layout), empty if it is to be measured.
            may_initialize: Whether its first batch may initialize it, as that of a training may.

        Raises:
            ConfigError: If the network has no such layer, or is a scripted one.
        """
        super().__init__()
        network, layer = unwrapped(network, layer)
        named = dict(network.named_modules())
        name = type(network).__name__
        if layer not in named:
            close = [each for each in named if each.endswith(layer.rpartition(".")[2])]
            known = ", ".join(name for name in close or named if name)
            raise ConfigError(f"{name} has no layer {layer!r}; its modules are {known[:500]}")
        require(
            not isinstance(network, torch.jit.ScriptModule),
            f"{name} is a scripted network, whose layers cannot be read; use the module that it was scripted from",
        )
        self.inner = network
        self.layer = layer
        self.normalize = normalize or nn.Identity()
        self.returns, self.may_initialize = returns, may_initialize
        self.layout = Layout.parse(layout) if layout else None
        self._is_probed = False
        self._classifier = ""
        self._stages: dict[str, Layout] | None = None

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole network, and return the features and the images, from which the head is run."""
        return self._run(images).features, images

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Run the network on the images of `context` with these features in the place of the layer's output."""
        assert context is not None
        if not self.layer:
            return features[:, :, 0, 0]

        def replace(output: Any) -> Any:
            assert self.layout is not None
            return self.layout.with_grid(output, features)

        with self._hook(self.layer, replace), sdpa_kernel(SDPBackend.MATH):
            return self._to_logits(self._call(context))

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """Compute logits, features and the requested intermediates in one pass of the network.

        Raises:
            ConfigError: If the network cannot be run, or does not have a requested intermediate.
        """
        if not self._is_probed:
            self._probe(images.detach())
        stages = self._stage_layers(images) if intermediates.stages else {}
        if intermediates.pooled and not (self.pools_by_average or self._classifier):
            self.forward_pooled(*self.forward_trunk(images))  # raises
        output = self._run(images, stages, is_pooled=intermediates.pooled)
        class_maps = self.class_maps(output.features) if intermediates.class_maps else None
        return output._replace(class_maps=class_maps)

    def _run(
        self, images: Tensor, stages: Mapping[str, Layout] = _NO_LAYERS, *, is_pooled: bool = False
    ) -> ModelOutput:
        """Run the network once.

        Args:
            images: [B, 3, H, W].
            stages: Layouts of the layers that end a stage, by their names.
            is_pooled: Whether to return the pooled features.

        Returns:
            The logits, the layer's features [B, C, h, w], of no layer the logits [B, K, 1, 1], and the others.
        """
        size = (images.shape[2], images.shape[3])
        grids: dict[str, Tensor] = {}
        pooled: list[Tensor] = []

        def read(name: str, layout: Layout, output: Any) -> Any:
            # One copy is kept, because the layer may return a view of what the network changes later. The network gets
            # another one, which it may change.
            grids[name] = layout.grid(output, size).clone()
            return layout.with_grid(output, grids[name]) if name == self.layer else None

        layers = {self.layer: self.layout} if self.layout and self.layer else {}
        with ExitStack() as hooks:
            for name, layout in {**stages, **layers}.items():
                hooks.enter_context(self._hook(name, partial(read, name, layout)))
            if is_pooled and not self.pools_by_average:
                classifier = self.inner.get_submodule(self._classifier)
                handle = classifier.register_forward_pre_hook(
                    lambda module, inputs: pooled.append(to_float32(inputs[0]))
                )
                hooks.callback(handle.remove)
            if layers and torch.is_grad_enabled():
                # An explanation is differentiated twice, which only this implementation of attention supports.
                hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
            logits = self._to_logits(self._call(images))
        features = grids[self.layer] if self.layer else logits[:, :, None, None]
        if is_pooled and self.pools_by_average:
            pooled.append(to_float32(features).mean(dim=(2, 3)))
        return ModelOutput(
            logits,
            features,
            images,
            tuple(Stage(grids[name], grids[name]) for name in stages),
            pooled=pooled[0] if pooled else None,
        )

    def _stage_layers(self, images: Tensor) -> Mapping[str, Layout]:
        """Return the layouts of the layers that end a stage, which are measured once."""
        if self._stages is None:
            self._stages = {
                grid.name: grid.layout for grid in stage_ends(self._grids(_examples_like(images)))
            }
            if self._stages:
                logger.info(
                    "the stages of %s are the outputs of %s",
                    type(self.inner).__name__,
                    ", ".join(self._stages),
                )
        if not self._stages:
            super().forward_stages(images)  # raises
        return self._stages

    def _call(self, images: Tensor, network: nn.Module | None = None) -> Any:
        """Run the network, or a copy of it, on its input, which it may change in place."""
        normalized: Tensor = self.normalize(images)
        inputs = normalized.clone() if normalized is images else normalized
        return (network or self.inner)(inputs)

    def _to_logits(self, outputs: Any) -> Tensor:
        """Return logits whose softmax the outputs are: their logarithms, which differ from others by a constant."""
        name = type(self.inner).__name__
        outputs = logits_in(outputs)
        require(
            isinstance(outputs, Tensor) and outputs.ndim == 2,
            f"{name} must return logits [B, K]; {'in training ' if self.training else ''}it returns "
            f"{describe_output(outputs)}. Wrap it in a module that returns them",
        )
        values = to_float32(outputs)  # of a network with autocast inside
        if self.returns == "probabilities":
            logs = values.clamp(min=_MIN_PROBABILITY).log()  # whose gradient is finite at 0
            return torch.where(values > 0, logs, IMPOSSIBLE_LOGIT)
        return values.clamp(min=IMPOSSIBLE_LOGIT) if self.returns == "log_probabilities" else values

    @contextlib.contextmanager
    def _hook(self, layer: str, change: Callable[[Any], Any]) -> Iterator[None]:
        """Call `change` with the output of a layer, whose result replaces it unless it is None."""
        handle = self.inner.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output: change(output)
        )
        try:
            yield
        finally:
            handle.remove()

    # ---- the first pass ------------------------------------------------------------------------

    def _probe(self, images: Tensor) -> None:
        """Determine the layer if none is named, the layout of its output, and the closed form of what follows it.

        A network without a layer that can be explained has logits and an embedding, and `no_grid` says why.

        Args:
            images: [B, 3, H, W]; only shape, dtype and device are used.

        Raises:
            ConfigError: If the network cannot be run.
        """
        examples, layer, layout = _examples_like(images), self.layer, self.layout
        names = [layer] if layer else self._last_grids(examples)
        error = None
        for self.layer in names:
            error = self._error_of(layout, examples)
            if error is None and (self.layer == names[-1] or not self.misplacement):
                break
        else:
            self.layer, self.no_grid = "", str(error or "no layer returns a grid, or its tokens")
            if (without := self._error_of(None, examples)) is not None:
                raise without if error is None or not layer else error
        self._is_probed = True
        name = type(self.inner).__name__
        if not self.layer:
            text = (
                f"{name} has no maps, because {self.no_grid}; its logits and its embedding are read"
            )
            log_once(logger, logging.WARNING if layer else logging.INFO, text)
        elif not layer or (self.layout and "n" in self.layout.axes):
            text = f"{name} is explained at layer={self.layer} layout='{self.layout}'"
            log_once(logger, logging.INFO, text if layer else f"{text}, its last grid")
        self.has_dropout = any(
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            for module in self.inner.modules()
        )

    def _error_of(self, layout: Layout | None, examples: Tensor) -> ConfigError | None:
        """Examine the network at the layer, or without any, and return the error, None if it can be explained there."""
        self.layout, self.closed_form, self.misplacement = layout, None, ""
        try:
            self._run_safely(self._examine, examples)
        except ConfigError as error:
            return error
        return None

    def _run_safely(self, run: Callable[[Tensor], AnyResult], images: Tensor) -> AnyResult:
        """Run the network for the first time, and raise ConfigError in place of its own errors, by their kind."""
        try:
            return run(images)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a network of somebody's own may raise anything
            remedy = next(
                (text for words, text in _REMEDIES.items() if re.search(words, str(error))), _OWN
            )
            at = f" and explained at layer {self.layer}" if self.layer else ""
            raise ConfigError(
                f"{type(self.inner).__name__} cannot be run on images {str(images.dtype).removeprefix('torch.')} "
                f"{[*images.shape]}{at} ({first_line(error)}); {remedy}"
            ) from error

    def _examine(self, examples: Tensor) -> None:
        """Run a copy of the network as a frozen one, and compare what it gives."""
        with (
            eval_mode(self),
            self._on_copy(examples),
            torch.inference_mode(mode=False),
            torch.no_grad(),
            exact_float32(examples.device),
        ):
            self._probe_with(examples)

    def _grids(self, examples: Tensor) -> list[LayerGrid]:
        """Return the grids of the layers of a copy of the network."""
        network = trial_copy(self.inner)

        def run(images: Tensor) -> Tensor:
            return self._to_logits(self._call(images, network))

        with eval_mode(network), torch.inference_mode(mode=False), exact_float32(examples.device):
            return layer_grids(network, run, examples)

    def _last_grids(self, examples: Tensor) -> list[str]:
        """Return the last layers whose output is a grid that the logits depend on, the last one first."""
        grids = [grid for grid in self._run_safely(self._grids, examples) if grid.is_read]
        return [grid.name for grid in grids[::-1] if not grid.layout.part][:_MAX_TRIED]

    def _probe_with(self, examples: Tensor) -> None:
        """Run the network on variants of two images, and compare what it gives."""
        # The first and the last of these differ from both others in every pixel, or in the rim only.
        probes = torch.cat([replaced_parts(examples), examples[1:2]])
        name = type(self.inner).__name__
        outputs: list[tuple[str, Tensor]] = []

        def note(layer: str, module: nn.Module, output: Any) -> None:
            if isinstance(module, nn.Linear):
                outputs.append((layer, output))

        with watched(self.inner, note):
            logits, values = self._read(probes) if self.layer else self._run(probes)[:2]
        self._classifier = next(
            (each for each, output in outputs[::-1] if nearly_equal(to_float32(output), logits)), ""
        )
        if self.layer:
            self.layout = self._layout_of(values, examples)
            values = self.layout.grid(values, (examples.shape[2], examples.shape[3]))
            self._examine_input(examples, values[:-1])
            require(
                not logits.isfinite().all()
                or any(  # first in a small batch
                    nearly_equal(self._run(batch).logits, logits[: len(batch)], _SAME_LOGITS)
                    for batch in (probes[:2], probes)
                ),
                f"{name} gives other logits if the output of layer {self.layer} is copied: it is random in eval mode, "
                "counts its passes, or changes this tensor elsewhere; name another layer",
            )
        records = [len(probes) - 1, 1, 0]
        require_independent_records(
            name,
            self.inner,
            lambda images: self._run(images)[:2],
            probes[records],
            probes[5:6],
            (logits[records], values[records]),
        )
        if self.layer:
            self._match_head(examples[:1].clone())

    @contextlib.contextmanager
    def _on_copy(self, examples: Tensor) -> Iterator[None]:
        """Run a copy of the network, because some initialize themselves by the first batch that they receive."""
        network = self.inner
        self.inner = trial_copy(network)
        try:
            yield
            if not self.may_initialize:
                self._require_no_memory(network, examples)
        finally:
            if self.closed_form is not None and self.inner is not network:
                self.closed_form = _head_of(self.closed_form, self.inner, network)
            self.inner = network

    def _require_no_memory(self, network: nn.Module, examples: Tensor) -> None:
        """Raise DependentRecordsError if a network that has not run keeps something of the images that it runs on."""

        def run(model: nn.Module, images: Tensor) -> list[Tensor]:
            return [self._to_logits(self._call(images, model))]

        require_no_memory(type(network).__name__, network, run, examples, examples.flip(0))

    def _examine_input(self, images: Tensor, parts: Tensor) -> None:
        """Find what the network does to its images, and where the cells of the grids of `replaced_parts` lie."""
        name = type(self.inner).__name__
        reading = read_input(self.inner, images)
        geometry = "" if reading is None else reading.describe_geometry()
        self.misplacement = geometry or describe_wrong_places(parts)
        scaling = "" if reading is None else reading.describe_scaling()
        if scaling and isinstance(self.normalize, Normalize) and not self.normalize.is_identity:
            log_once(
                logger,
                logging.WARNING,
                f"{name} normalizes its images itself, {scaling}, after mean= and std= have done so; if it was "
                "trained on pixels in [0, 1], set mean=[0,0,0] std=[1,1,1], as in "
                "teacher.mean=[0,0,0] teacher.std=[1,1,1]",
            )

    def _read(self, images: Tensor) -> tuple[Tensor, Any]:
        """Return the logits and the layer's output as it is, or raise ConfigError for what they are."""
        outputs: list[Any] = []

        def keep(output: Any) -> None:
            # The network may change what the layer returns, as it may be a view.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

        with self._hook(self.layer, keep):
            logits = self._call(images)
        name = f"layer {self.layer} of {type(self.inner).__name__}"
        require(
            len(outputs) > 0,
            f"{name} does not run in a forward pass: it is unused, compiled, or called only in parts; name another",
        )
        require(
            len(outputs) == 1, f"{name} runs {len(outputs)} times in a forward pass; name another"
        )
        return self._to_logits(logits), outputs[0]

    def _layout_of(self, output: Any, images: Tensor) -> Layout:
        """Return the layout that is set, unless tokens clearly have another one, or measure it."""
        layout = self.layout
        if layout is None:
            return self._measure_layout(output, images)
        size, tensor = (images.shape[2], images.shape[3]), layout.tensor(output)
        if isinstance(tensor, Tensor) and tensor.ndim == 3:
            measured = token_layouts(tensor, size, _PROBES)
            require(
                len(measured) != 1 or measured[0]._replace(part=layout.part) == layout,
                f"layout={layout} of layer {self.layer}: replaced corners of an image move the tokens of "
                f"'{measured[0] if measured else ''}'; correct the option, or leave it out",
            )
        return layout

    def _measure_layout(self, output: Any, images: Tensor) -> Layout:
        """Return the layout of the layer's output, or raise ConfigError if the image has no grid in it.

        Args:
            output: The layer's output for `replaced_parts` of the images and one more.
            images: Images of the network.
        """
        size = (images.shape[2], images.shape[3])
        layouts: list[Layout] = []
        reason = "no two neighboring axes of it are the rows and columns of the image"
        for part, tensor in tensors_of(output).items():
            if is_attention(tensor):
                reason = "these are weights of an attention, which are shares of tokens"
            elif tensor.ndim == 3:
                reason = "no axis of it is clearly the patches of the image; set layout=, as in 'b hw c', if one is"
                layouts += [
                    layout._replace(part=part) for layout in token_layouts(tensor, size, _PROBES)
                ]
            elif len(tensor) == _PROBES:
                shapes = (self._shape_for(images, part, *scale) for scale in ((2, 1), (1, 2)))
                if layout := grid_layout(tensor[:-1], size, *shapes):
                    layouts.append(layout._replace(part=part))
            else:
                reason = "it has no axis of the batch, as a bias"
            if layouts:
                break
        name = (
            f"layer {self.layer} of {type(self.inner).__name__} returns {describe_output(output)}"
        )
        require(
            len(layouts) < 2,
            f"{name}, whose layout may be {' or '.join(repr(str(layout)) for layout in layouts)}; set layout= to one",
        )
        require(
            bool(layouts),
            f"{name} for images of {size[0]}x{size[1]} pixels, and {reason}; name a layer whose output is a grid",
        )
        return layouts[0]

    def _shape_for(self, images: Tensor, part: str, rows: int, columns: int) -> Shape | None:
        """Return the shape of the layer's output for images of that many times the size, None if they do not fit."""
        shapes: list[Shape] = []

        def stop(output: Any) -> None:
            shapes.append(tuple(getattr(tensors_of(output).get(part), "shape", ())))
            raise _LayerRead

        enlarged = images[:1].repeat(1, 1, rows, columns)
        with self._hook(self.layer, stop), contextlib.suppress(Exception, _LayerRead):
            self._call(enlarged)
        return shapes[0] if shapes and len(shapes[0]) == 4 else None

    def _match_head(self, images: Tensor) -> None:
        """Find the closed form of what follows the layer, and require a gradient if there is none."""
        features = self._run(images).features
        drawn = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features)
        logits = to_float32(self.forward_head(drawn, images))
        self.closed_form = self._match(to_float32(drawn).mean(dim=(2, 3)), logits)
        if self.closed_form is not None:
            return
        with torch.enable_grad():
            leaf = features.clone().requires_grad_()
            logits = self.forward_head(leaf, images)
            gradient = None
            if logits.requires_grad:
                weights = torch.linspace(0.5, 1.5, logits.numel()).reshape(logits.shape).to(logits)
                (gradient,) = torch.autograd.grad(logits, leaf, weights, allow_unused=True)
        require(
            gradient is not None,
            f"the logits of {type(self.inner).__name__} have no gradient with respect to layer {self.layer}: they do "
            "not depend on it, the network detaches them, or the layer is inside of a reentrant checkpoint "
            "(use_reentrant=True); name another layer",
        )
        require(
            "n" not in str(self.layout and self.layout.axes)
            or (gradient is not None and bool(gradient.any())),
            f"the logits of {type(self.inner).__name__} depend on no patch at layer {self.layer}, but on a class "
            "token; name a layer before the last attention, such as its norm",
        )

    @torch.no_grad()
    def _match(self, average: Tensor, logits: Tensor) -> Head | None:
        """Return the linear layer of the network, with or without a norm, that gives these logits for the average."""
        modules = list(self.inner.modules())
        linears = [
            module
            for module in modules
            if isinstance(module, nn.Linear) and module.in_features == average.shape[1]
        ]
        norms = [
            module
            for module in modules
            if isinstance(module, nn.LayerNorm) and module.normalized_shape == average.shape[1:]
        ]
        for linear in linears:
            inputs = average.to(linear.weight.dtype)
            if nearly_equal(logits, to_float32(linear(inputs))):
                return GapLinear(linear)
            for norm in norms:
                if nearly_equal(logits, to_float32(linear(apply_norm(norm, inputs)))):
                    return GapNormLinear(norm, linear)
        return None


def _head_of(head: Head, network: nn.Module, other: nn.Module) -> Head:
    """Return the head of one network with the modules of the same names of another."""
    names = {module: name for name, module in network.named_modules()}
    parts = {
        field.name: other.get_submodule(names[getattr(head, field.name)]) for field in fields(head)
    }
    return type(head)(**parts)  # type: ignore[arg-type]


def unwrapped(network: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """Return the network inside of torch.compile, DataParallel and DistributedDataParallel, and its layer's name."""
    for attribute in ("_orig_mod", "module"):
        is_wrapper = attribute == "_orig_mod" or isinstance(
            network, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        )
        inner = getattr(network, attribute, None)
        if is_wrapper and isinstance(inner, nn.Module):
            return unwrapped(inner, layer.removeprefix(f"{attribute}."))
    return network, layer


def _examples_like(images: Tensor) -> Tensor:
    """Return two images [2, 3, H, W] of random pixels."""
    return torch.rand(2, *images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)


def logits_in(returned: Any) -> Any:
    """Return the logits of what a network returns: of a dict, a dataclass or a tuple with such an entry, or itself.

    A tuple without names has them as its only tensor of two axes.
    """
    if isinstance(returned, Mapping):
        return returned.get("logits", returned)
    if hasattr(returned, "logits"):
        return returned.logits
    if isinstance(returned, (tuple, list)):
        tables = [entry for entry in returned if isinstance(entry, Tensor) and entry.ndim == 2]
        return tables[0] if len(tables) == 1 else returned
    return returned


# ---- provider --------------------------------------------------------------------------------------


def build_module(config: ModuleConfig, outputs: int) -> Classifier:
    """Build the network by the function that the options name.

    Raises:
        ConfigError: If the function does not take the arguments or does not return a module, or its network has no such
            layer.
    """
    where = f"kind=module, factory={config.factory}"
    require(
        not is_published(config.weights),
        f"{where}: weights={config.weights} names published weights; load them in the factory, or name a file",
    )
    factory = resolve_factory(config.factory)
    require(
        not isinstance(factory, nn.Module),
        f"{where} is a network and not a function that builds one; write def build(num_classes): return ..., and name "
        "it",
    )
    try:
        inspect.signature(factory).bind(outputs, **config.arguments)
    except TypeError as error:
        raise ConfigError(
            f"{where}: {error}; correct arguments={config.arguments}, or let the function take (number of classes, "
            "**arguments)"
        ) from error
    network = factory(outputs, **config.arguments)
    require(
        isinstance(network, nn.Module),
        f"{where} returned {type(network).__name__} instead of a torch.nn.Module",
    )
    # A pass or a training has its own option for lower precisions.
    return ModuleClassifier(
        network.float(),
        config.layer,
        Normalize(*model_normalization(config)),
        config.returns,
        layout=config.layout,
        may_initialize=config.weights is None,
    )


PROVIDER = Provider(build_module, lambda config: None)
