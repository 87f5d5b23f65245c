"""Networks of one's own: any module from images to logits, explained at a layer that is named.

A forward hook reads the layer's output, so the network needs no base class and no division into trunk and head.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from permafrost.config.models import is_published
from permafrost.config.plugins import resolve_factory
from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import (
    NO_INTERMEDIATES,
    Classifier,
    GapLinear,
    GapNormLinear,
    Head,
    Intermediates,
    ModelOutput,
    Normalize,
    Provider,
    apply_norm,
    eval_mode,
    nearly_equal,
    to_float32,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from permafrost.config.models import ModuleConfig


class ModuleClassifier(Classifier):
    """Any module from images to logits [B, K], whose features are the output of one of its layers.

    The maps of a network whose logits are a linear layer on the average of these features, with or without a layer
    norm, have a closed form, which is found by running the rest of the network on random features. Otherwise the
    gradient with respect to the features is computed: for a student in the graph of its step, for a frozen network by
    running it again on the same images with the features in the layer's place.
    """

    def __init__(self, network: nn.Module, layer: str, normalize: Normalize | None = None) -> None:
        """layer  name of the module that is explained, as in network.named_modules(). Its output is [B, C, h, w]"""
        super().__init__()
        named = dict(network.named_modules())
        if layer not in named or not layer:
            known = ", ".join(name for name in named if name)
            raise ConfigError(
                f"{type(network).__name__} has no layer {layer!r}; its modules are {known[:500]}"
            )
        self.inner = network
        self.layer = layer
        self.normalize = normalize or nn.Identity()
        self._closed_form: Head | None = None
        self._has_dropout = False
        self._is_probed = False

    @property
    def network(self) -> nn.Module:
        """The module itself, whose state dict has its own names."""
        return self.inner

    @property
    def head(self) -> Head | None:
        """Closed form of what follows the layer, None until the first forward pass or if it has none."""
        return None if self.training and self._has_dropout else self._closed_form

    @property
    def pools_by_average(self) -> bool:
        return self._closed_form is not None

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the whole network, and return the features and the images, from which the head is run."""
        features, _ = self._run(images)
        return features, images

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Run the network on the images of `context` with these features in the place of the layer's output."""
        assert context is not None
        with self._hook(lambda output: features.to(output.dtype)):
            logits: Tensor = self.inner(self.normalize(context))
        return logits

    def forward(
        self, images: Tensor, intermediates: Intermediates = NO_INTERMEDIATES
    ) -> ModelOutput:
        """Compute logits, features and the requested intermediates in one pass of the network."""
        if intermediates.stages:
            self.forward_stages(images)  # raises
        if not self._is_probed:
            self._probe(images.detach()[:1])
        features, logits = self._run(images)
        class_maps = self.class_maps(features) if intermediates.class_maps else None
        pooled = None
        if intermediates.pooled:
            if not self.pools_by_average:
                self.forward_pooled(features, images)  # raises
            pooled = to_float32(features).mean(dim=(2, 3))
        return ModelOutput(logits, features, images, (), class_maps, pooled)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's output and the logits of one forward pass."""
        outputs: list[Any] = []
        with self._hook(outputs.append):
            logits = self.inner(self.normalize(images))
        return self._checked(outputs, logits)

    def _checked(self, outputs: list[Any], logits: Any) -> tuple[Tensor, Tensor]:
        """Return features and logits. Raises ConfigError unless they are [B, C, h, w] and [B, K]."""
        name = f"layer {self.layer} of {type(self.inner).__name__}"
        require(
            len(outputs) == 1, f"{name} runs {len(outputs)} times in a forward pass; name another"
        )
        (features,) = outputs
        described = [*getattr(features, "shape", [])] or type(features).__name__
        require(
            isinstance(features, Tensor) and features.ndim == 4,
            f"{name} returns {described} instead of features [B, C, h, w]; name a layer whose output is a grid",
        )
        require(
            isinstance(logits, Tensor) and logits.ndim == 2,
            f"{type(self.inner).__name__} must return logits [B, K]; it returns "
            f"{[*getattr(logits, 'shape', [])] or type(logits).__name__}. Wrap it in a module that returns them",
        )
        return features, logits

    def _probe(self, images: Tensor) -> None:
        """Determine the closed form of what follows the layer, by running it on random features."""
        self._is_probed = True
        with (
            eval_mode(self),
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
        ):
            features, _ = self._run(images)
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(features.shape, generator=generator).to(features)
            logits = self.forward_head(drawn, images)
            self._closed_form = self._match(drawn.mean(dim=(2, 3)), logits)
        self._has_dropout = any(
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            for module in self.inner.modules()
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
            if nearly_equal(logits, linear(average)):
                return GapLinear(linear)
            for norm in norms:
                if nearly_equal(logits, linear(apply_norm(norm, average))):
                    return GapNormLinear(norm, linear)
        return None

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


def build_module(config: ModuleConfig, outputs: int) -> Classifier:
    """Build the network by the function that the options name."""
    where = f"kind=module, factory={config.factory}"
    require(
        not is_published(config.weights),
        f"{where}: weights={config.weights} names published weights; load them in the factory, or name a file",
    )
    factory = resolve_factory(config.factory)
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
    assert config.mean is not None
    assert config.std is not None
    return ModuleClassifier(network, config.layer, Normalize(config.mean, config.std))


PROVIDER = Provider(build_module, lambda config: None)
