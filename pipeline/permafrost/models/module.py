"""Networks of one's own: any module from images to logits, explained at a layer that is named.

A forward hook reads the layer's output, so the network needs no base class and no division into trunk and head. The
network continues with a copy of what was read, so operations in place, before or after, do not change the features.

The axes of the layer's output that are the rows and columns of the image are measured: they are those that grow with
it. If the network takes images of one size only, or pools them to one, the proportions of the axes decide, and where
the output changes if a corner of the image is replaced.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

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
    apply_norm,
    eval_mode,
    has_proportions,
    nearly_equal,
    to_float32,
    trial_copy,
)
from permafrost.models.compute import exact_float32
from permafrost.models.image_places import (
    describe_wrong_places,
    order_of_axes,
    read_input,
    replaced_parts,
)
from permafrost.models.providers import model_normalization
from permafrost.models.record_independence import require_independent_records, require_no_memory

logger = logging.getLogger("permafrost.models")

_MIN_PROBABILITY = torch.finfo(torch.float32).tiny
_SAME_LOGITS = 1e-3
"""Largest difference of two passes of the same images, in units of the largest logit."""


class _LayerRead(BaseException):
    """Signal that ends a forward pass at the layer, past what handles errors in the network."""


class ModuleClassifier(ProbedClassifier):
    """Any module from images to logits [B, K], whose features are the output of one of its layers.

    The output of the layer is a grid, with the channels first or last. The maps of a network whose logits are a linear
    layer on the average of these features, with or without a layer norm, have a closed form, which is found by running
    the rest of the network on random features. Otherwise the gradient with respect to the features is computed: for a
    student in the graph of its step, for a frozen network by running it again on the same images with the features in
    the layer's place.

    The first forward pass examines the network (`_probe`), and raises ConfigError if it cannot be explained there.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        normalize: Normalize | None = None,
        returns: NetworkReturns = "logits",
        *,
        may_initialize: bool = False,
    ) -> None:
        """Open the wrappers of a network.

        Args:
            network: Module from images to logits [B, K].
            layer: Name of the module that is explained, as in network.named_modules(); empty takes the last one whose
                output is a grid.
            normalize: Normalization of the images, None for none.
            returns: What the network returns; this module returns the logits in it.
            may_initialize: Whether its first batch may initialize it, as that of a training may.

        Raises:
            ConfigError: If the network has no such layer, or is a scripted one.
        """
        super().__init__()
        network, layer = unwrapped(network, layer)
        named = dict(network.named_modules())
        name = type(network).__name__
        if layer not in named:
            known = ", ".join(name for name in named if name)
            raise ConfigError(f"{name} has no layer {layer!r}; its modules are {known[:500]}")
        require(
            not isinstance(network, torch.jit.ScriptModule),
            f"{name} is a scripted network, whose layers cannot be read; use the module that it was scripted from",
        )
        self.inner = network
        self.layer = layer
        self.normalize = normalize or nn.Identity()
        self.returns, self.may_initialize = returns, may_initialize
        self._is_probed = False
        self._is_channels_last = False

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole network, and return the features and the images, from which the head is run."""
        features, _ = self._run(images)
        return features, images

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Run the network on the images of `context` with these features in the place of the layer's output."""
        assert context is not None
        if not self.layer:
            return features[:, :, 0, 0]

        def replace(output: Tensor) -> Tensor:
            return self._to_native(features.to(output.dtype)).clone()

        with self._hook(replace), sdpa_kernel(SDPBackend.MATH):
            outputs: Tensor = self.inner(self._input(context))
        return self._to_logits(outputs)

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """Compute logits, features and the requested intermediates in one pass of the network.

        Raises:
            ConfigError: If the network cannot be explained at the layer, or does not have a requested intermediate.
        """
        if intermediates.stages:
            self.forward_stages(images)  # raises
        if not self._is_probed:
            self._probe(images.detach())
        features, logits = self._run(images)
        class_maps = self.class_maps(features) if intermediates.class_maps else None
        pooled = None
        if intermediates.pooled:
            if not self.pools_by_average:
                self.forward_pooled(features, images)  # raises
            pooled = to_float32(features).mean(dim=(2, 3))
        return ModelOutput(logits, features, images, (), class_maps, pooled)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output [B, C, h, w], of none the logits [B, K, 1, 1], and the logits of one pass."""
        if not self.layer:
            logits = self._to_logits(self.inner(self._input(images)))
            return logits[:, :, None, None], logits
        outputs: list[Tensor] = []

        def read(output: Tensor) -> Tensor:
            # One copy is kept, because the layer may return a view of what the network changes later. The network gets
            # another one, which it may change.
            outputs.append(self._to_grid(output).clone())
            return self._to_native(outputs[-1]).clone()

        # An explanation is differentiated twice, which only this implementation of attention supports.
        attention = sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else _NO_CONTEXT
        with self._hook(read), attention:
            returned: Tensor = self.inner(self._input(images))
        return outputs[0], self._to_logits(returned)

    def _input(self, images: Tensor) -> Tensor:
        """Return the network's input, which it may change in place."""
        normalized: Tensor = self.normalize(images)
        return normalized.clone() if normalized is images else normalized

    def _to_logits(self, outputs: Any) -> Tensor:
        """Return logits whose softmax the outputs are: their logarithms, which differ from others by a constant."""
        name = type(self.inner).__name__
        if isinstance(outputs, dict) and "logits" in outputs:  # of transformers
            outputs = outputs["logits"]
        require(
            isinstance(outputs, Tensor) and outputs.ndim == 2,
            f"{name} must return logits [B, K]; {'in training ' if self.training else ''}it returns "
            f"{_described(outputs)}. Wrap it in a module that returns them",
        )
        values = to_float32(outputs)  # of a network with autocast inside
        if self.returns == "probabilities":
            logs = values.clamp(min=_MIN_PROBABILITY).log()  # whose gradient is finite at 0
            return torch.where(values > 0, logs, IMPOSSIBLE_LOGIT)
        return values.clamp(min=IMPOSSIBLE_LOGIT) if self.returns == "log_probabilities" else values

    def _to_grid(self, output: Tensor) -> Tensor:
        return output.permute(0, 3, 1, 2) if self._is_channels_last else output

    def _to_native(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1) if self._is_channels_last else features

    @contextlib.contextmanager
    def _hook(self, change: Callable[[Any], Any]) -> Iterator[None]:
        """Call `change` with the output of the layer, whose result replaces it unless it is None."""
        handle = self.inner.get_submodule(self.layer).register_forward_hook(
            lambda module, inputs, output: change(output)
        )
        try:
            yield
        finally:
            handle.remove()

    # ---- the first pass ------------------------------------------------------------------------

    def _probe(self, images: Tensor) -> None:
        """Determine the layout of the layer's output, and the closed form of what follows the layer.

        Args:
            images: [B, 3, H, W]; only shape, dtype and device are used.

        Raises:
            ConfigError: If the network cannot be run or differentiated, or the output is not a grid of the image.
        """
        generator = torch.Generator().manual_seed(0)
        examples = torch.rand(2, *images.shape[1:], generator=generator).to(images)
        is_chosen = not self.layer
        try:
            if is_chosen:
                self.layer = self._last_grid(examples)
            try:
                self._examine(examples)
            except ConfigError:
                if not (is_chosen and self.layer):
                    raise
                self.layer, self.closed_form, self._is_channels_last = "", None, False
                self._examine(examples)
        except UserError:
            raise
        except Exception as error:  # a network of somebody's own may raise anything
            raise ConfigError(
                f"{type(self.inner).__name__} cannot be run on images {str(images.dtype).removeprefix('torch.')} "
                f"{[*images.shape]} and explained at layer {self.layer} ({first_line(error)}); correct the size and "
                "channels of the images"
            ) from error
        self._is_probed = True
        self.has_dropout = any(
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            for module in self.inner.modules()
        )

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
        if not self.layer:
            log_once(
                logger,
                logging.INFO,
                f"{type(self.inner).__name__} has no layer whose output is a grid [B, C, h, w] or [B, h, w, C], so its "
                "logits are all that is known of it; name a layer that has one for maps",
            )

    @torch.no_grad()
    def _last_grid(self, examples: Tensor) -> str:
        """Return the name of the last module whose output has rows and columns, empty if none has."""
        network, grids = trial_copy(self.inner), []

        def read(name: str, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                grids.append((name, _described(output)))

        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: read(name, output))
            for name, module in network.named_modules()
            if name
        ]
        with eval_mode(network):
            network(self._input(examples))
        for handle in handles:
            handle.remove()
        if not grids:
            return ""
        name, shape = grids[-1]
        log_once(
            logger,
            logging.INFO,
            f"{type(network).__name__} is explained at layer={name} {shape}, its last grid",
        )
        return name

    def _probe_with(self, examples: Tensor) -> None:
        """Run the network on variants of two images, and compare what it gives."""
        # The first and the last of these differ from both others in every pixel, or in the rim only.
        probes = torch.cat([replaced_parts(examples), examples[1:2]])
        name = type(self.inner).__name__
        if self.layer:
            native, logits = self._read(probes)
            self._is_channels_last = self._layout(native[:-1], examples) == "last"
            grids = self._to_grid(native)
            self._examine_input(examples, grids[:-1])
            require(
                not logits.isfinite().all()
                or any(  # first in a small batch
                    nearly_equal(self._run(batch)[1], logits[: len(batch)], _SAME_LOGITS)
                    for batch in (probes[:2], probes)
                ),
                f"{name} gives other logits if the output of layer {self.layer} is copied: it is random in eval mode, "
                "counts its passes, or changes this tensor elsewhere; name another layer",
            )
        else:
            grids, logits = self._run(probes)
        records = [len(probes) - 1, 1, 0]
        outputs = (grids[records], logits[records])
        require_independent_records(
            name, self.inner, self._run, probes[records], probes[5:6], outputs
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
            return [self._to_logits(model(self._input(images)))]

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

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output as it is and the logits, or raise ConfigError for what they are."""
        outputs: list[Any] = []

        def keep(output: Any) -> None:
            # The network may change what the layer returns, as it may be a view.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

        with self._hook(keep):
            logits = self.inner(self._input(images))
        name = f"layer {self.layer} of {type(self.inner).__name__}"
        require(
            len(outputs) > 0,
            f"{name} does not run in a forward pass: it is unused, compiled, or called only in parts; name another",
        )
        require(
            len(outputs) == 1, f"{name} runs {len(outputs)} times in a forward pass; name another"
        )
        (output,) = outputs
        require(
            isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images),
            f"{name} returns {_described(output)} instead of features [B, C, h, w] or [B, h, w, C]; name a layer whose "
            "output is a grid",
        )
        return output, self._to_logits(logits)

    def _layout(self, parts: Tensor, images: Tensor) -> str:
        """Return the place of the channels in the layer's output: "first" or "last".

        Args:
            parts: The layer's output for `replaced_parts` of the images.
            images: Images of the network.
        """
        height, width = images.shape[2:]
        taller, wider = (self._shape_for(images, *scale) for scale in ((2, 1), (1, 2)))
        layout = _layout_by_sizes(parts.shape, taller, wider) if taller and wider else None
        if layout is None:
            layout = _layout_by_places(parts, (height, width))
        require(
            layout != "none",
            f"layer {self.layer} of {type(self.inner).__name__} returns {_described(parts)} for images of "
            f"{height}x{width} pixels, and no two neighboring axes of it are the rows and columns of the image; name a "
            "layer whose output is a grid",
        )
        return layout

    def _shape_for(self, images: Tensor, rows: int, columns: int) -> _Shape | None:
        """Return the shape of the layer's output for images of that many times the size, None if they do not fit."""
        shapes: list[_Shape] = []

        def stop(output: Any) -> None:
            shapes.append(tuple(getattr(output, "shape", ())))
            raise _LayerRead

        enlarged = images[:1].repeat(1, 1, rows, columns)
        with self._hook(stop), contextlib.suppress(Exception, _LayerRead):
            self.inner(self._input(enlarged))
        return shapes[0] if shapes and len(shapes[0]) == 4 else None

    def _match_head(self, images: Tensor) -> None:
        """Find the closed form of what follows the layer, and require a gradient if there is none."""
        features, _ = self._run(images)
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
                (gradient,) = torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
        require(
            gradient is not None,
            f"the logits of {type(self.inner).__name__} have no gradient with respect to layer {self.layer}: they do "
            "not depend on it, or the network detaches them; name another layer",
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


_NO_CONTEXT: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


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


def _described(output: Any) -> str:
    """Return the shape of a batch's output, or its type."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    return f"[{', '.join(['B', *map(str, output.shape[1:])])}]"


# ---- the layout of a grid --------------------------------------------------------------------------

_Shape = tuple[int, ...]


def _layout_by_sizes(shape: _Shape, taller: _Shape, wider: _Shape) -> str | None:
    """Return the layout of a grid from its shapes for an image, one of twice its height, and one of twice its width.

    Returns:
        "first", "last" or "none", the place of the channels; None if the shape does not depend on the image.
    """
    rows = [axis for axis in (1, 2, 3) if taller[axis] != shape[axis]]
    columns = [axis for axis in (1, 2, 3) if wider[axis] != shape[axis]]
    known = {((2,), (3,)): "first", ((1,), (2,)): "last", ((), ()): None}
    return known.get((tuple(rows), tuple(columns)), "none")


def _layout_by_places(output: Tensor, size: tuple[int, int]) -> str:
    """Return the layout of a grid whose shape is the same for all images: "first", "last" or "none".

    Args:
        output: [6, C, h, w] or [6, h, w, C] for `replaced_parts` of images of (height, width) `size`.
    """
    orders = {
        layout: order_of_axes(grid)
        for layout, grid in {"first": output, "last": output.permute(0, 3, 1, 2)}.items()
        if has_proportions((grid.shape[2], grid.shape[3]), size)
    }
    return max(orders, key=lambda layout: orders[layout], default="none")


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
        may_initialize=config.weights is None,
    )


PROVIDER = Provider(build_module, lambda config: None)
