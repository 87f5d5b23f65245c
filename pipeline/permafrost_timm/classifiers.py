"""Image classifiers of timm, split at the explained layer.

Networks with a grid of features are split at timm's forward_features and forward_head. The explained layer of a
VisionTransformer is the last block's output if all tokens are pooled. If a class token is read, it is the input of
that block's attention, after its norm. An Eva (DINOv3, EVA-02) is treated as a VisionTransformer that pools its tokens.
Others are explained as any module is, at the last grid that their logits depend on.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from safetensors import SafetensorError
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from permafrost.config.models import CENTER_CROP_FRACTION, ModelConfig, is_published
from permafrost.core.errors import ConfigError, FileError, first_line, require
from permafrost.core.generators import SeededDraws
from permafrost.models.classifier import (
    Classifier,
    GapLinear,
    GapNormLinear,
    Head,
    Normalize,
    PretrainedInfo,
    ProbedClassifier,
    Provider,
    Stage,
    WeightsError,
    apply_norm,
    eval_mode,
    nearly_equal,
    require_size,
    to_float32,
)
from permafrost.models.layouts import stage_blocks
from permafrost.models.module import ModuleClassifier
from permafrost.models.providers import model_normalization
from permafrost.models.saved import TrainedModel
from permafrost.storage.files import file_at
from permafrost_timm.options import TimmModelConfig

_MAX_STAGES = 4


# ---- building ------------------------------------------------------------------------------------


def build_timm(config: TimmModelConfig, outputs: int) -> Classifier:
    """Build the named network with published weights for `weights: pretrained`, otherwise with new ones.

    If the published head has another number of outputs, timm keeps the trunk and initializes a new head.

    Raises:
        ConfigError: If timm does not have the network or the weights, or the network cannot be explained.
        WeightsError: If the weights cannot be fetched.
    """
    published = published_timm(config)
    require(
        published is not None or not is_published(config.weights),
        f"weights={config.weights}: timm has no weights of {config.name}, which was registered without a "
        "default_cfg; name a file, or register one",
    )
    resize = published is not None and published.fixed_size and config.input_size is not None
    network = _create(
        _tagged(config),
        pretrained=is_published(config.weights),
        num_classes=outputs,
        **({"img_size": config.input_size} if resize else {}),
    )
    return _wrap(config, network)


def _wrap(config: ModelConfig, network: Any) -> Classifier:
    normalize = Normalize(*model_normalization(config))
    split = next((kind for kind in (TimmVit, TimmEva) if isinstance(network, kind.kind)), None)
    if not (split.can_split(network) if split else _returns_grid(network)):
        return TimmModule(network, "", normalize, may_initialize=True)
    return (split or TimmClassifier)(config.name, normalize, network)


def _returns_grid(network: Any) -> bool:
    """Return whether forward_features returns a grid, computed without values if no pooling of a grid shows it."""
    if any(isinstance(module, SelectAdaptivePool2d) for module in network.modules()):
        return True
    size, features = network.pretrained_cfg.get("input_size", (3, 224, 224)), None
    # In train mode, because some keep tensors in eval mode. A network of somebody's own may raise anything.
    with (
        eval_mode(network),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        suppress(Exception),
    ):
        features = network.train().forward_features(torch.empty(2, *size))
    return isinstance(features, Tensor) and features.ndim == 4


def published_timm(config: TimmModelConfig) -> PretrainedInfo | None:
    """Return timm's facts about the named weights, None for a network that was registered without any."""
    name = _tagged(config)
    if ":" in name:
        with SeededDraws(0):  # of weights that are not used
            values = _create(name, pretrained=False).pretrained_cfg
    else:
        _require_known(name)
        if (pretrained_cfg := timm.get_pretrained_cfg(name)) is None:
            return None
        values = pretrained_cfg.to_dict()  # type: ignore[no-untyped-call]
    crop_fraction = values["crop_pct"] or CENTER_CROP_FRACTION
    return PretrainedInfo(
        name=values.get("tag") or name,
        classes=values["num_classes"],
        input_size=values["input_size"][-1],
        fixed_size=values["fixed_input_size"],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        crop_fraction=None if values.get("crop_mode") == "squash" else crop_fraction,
        interpolation="bilinear" if values["interpolation"] == "bilinear" else "bicubic",
        labels=tuple(values.get("label_names") or ()),
        unsupported=tuple(_unsupported(values, crop_fraction)),
    )


def _unsupported(values: Mapping[str, Any], crop_fraction: float) -> Iterator[tuple[str, str, str]]:
    """Iterate over what timm's evaluation transform does that a teacher's input cannot have."""
    mode, interpolation = values.get("crop_mode") or "center", values["interpolation"] or "bicubic"
    if mode == "squash" and crop_fraction < 1:  # timm squashes the image, then crops the square
        mode = f"squash and crop_pct={crop_fraction:g}"
    if mode not in ("center", "squash"):
        yield "frame", f"crop_mode={mode}", "teacher.frame=full or teacher.frame=center_crop"
    if interpolation not in ("bicubic", "bilinear"):
        yield "interpolation", f"interpolation={interpolation}", "teacher.interpolation=bilinear"
    height, width = values["input_size"][-2:]
    if height != width:
        yield "input_size", f"input_size={height}x{width}", f"teacher.input_size={width}"


def _tagged(config: TimmModelConfig) -> str:
    """Return timm's name of the network, with the tag of `pretrained:<tag>` if the name has none."""
    tag = (config.weights or "").partition(":")[2] if is_published(config.weights) else ""
    if not tag:
        return config.name
    require(
        ":" not in config.name and config.name.partition(".")[2] in ("", tag),
        f"weights=pretrained:{tag} and name={config.name} name two sets of weights; set weights=pretrained",
    )
    return f"{config.name.partition('.')[0]}.{tag}"


_OF_ANY_WEIGHTS = (
    *("num_classes", "input_size", "fixed_input_size", "pool_size", "mean", "std", "interpolation"),
    *("crop_pct", "crop_mode", "first_conv", "classifier", "custom_load"),
)
"""Keys of timm's config.json about the input and the network, independent of the origin of the weights."""


def save_for_hub(folder: Path, model: Classifier, trained: TrainedModel) -> None:
    """Write model.safetensors and config.json, for timm.create_model("local-dir:<folder>", pretrained=True).

    The weights are those of the run, so the tag, the license and the origin of timm's published weights are removed.

    Args:
        folder: Folder to write, within that of the training.
        model: Trained network.
        trained: Its description.

    Raises:
        FileError: If the folder cannot be written.
    """
    assert isinstance(model, (_TimmNetwork, TimmModule))
    assert isinstance(model.normalize, Normalize)
    config, run = trained.config, folder.parent
    assert isinstance(config, TimmModelConfig)
    num_classes = config.classes or trained.num_classes
    preprocessing = {
        "num_classes": num_classes,
        "input_size": (3, *trained.input_size),
        "mean": tuple(model.normalize.mean.flatten().tolist()),
        "std": tuple(model.normalize.std.flatten().tolist()),
    }
    # safetensors takes no weights in channels-last format, which the run keeps.
    network = deepcopy(model.network).to(memory_format=torch.contiguous_format)
    try:
        timm.models.save_for_hf(
            network,
            str(folder),
            model_config={"num_classes": num_classes, "pretrained_cfg": preprocessing},
            safe_serialization=True,
        )
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{folder} cannot be written ({first_line(error)}). Finished files are kept. Run the same command again "
            "once there is room"
        ) from error
    path = folder / "config.json"
    written = json.loads(path.read_text())
    settings = {key: written["pretrained_cfg"].get(key) for key in _OF_ANY_WEIGHTS}
    settings = {key: value for key, value in settings.items() if value is not None}
    settings["tag"] = run.parent.name or run.name
    if config.license is not None:
        settings["license"] = config.license
    written["pretrained_cfg"] = settings
    if len(trained.classes) == num_classes:
        written["label_names"] = list(trained.classes)
    if config.weights is not None:
        written["started_from"] = config.weights if is_published(config.weights) else "a file"
    file_at(path).write((json.dumps(written, indent=2) + "\n").encode())


def _create(name: str, **options: Any) -> Any:
    if ":" not in name:
        _require_known(name)
    try:
        return timm.create_model(name, **options)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"timm cannot build {name} with these weights ({error}); correct the name, set weights= to a local file, "
            "or read the local cache alone with HF_HUB_OFFLINE=1"
        ) from error


def _require_known(name: str) -> None:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        raise ConfigError(
            f"timm has no model {name!r}; similar names: {', '.join(close) or 'none'}"
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = [model for model in timm.list_pretrained() if model.startswith(f"{architecture}.")]
        raise ConfigError(
            f"timm has no weights {name!r}; choose one of: {', '.join(known)}"
        ) from error


# ---- common base of both kinds -------------------------------------------------------------------


class _TimmNetwork(ProbedClassifier):
    """A network of timm with its normalization. A head that reads a class token has no closed form."""

    inner: Any

    def __init__(self, name: str, normalize: Normalize, network: Any) -> None:
        super().__init__()
        self.name, self.normalize = name, normalize
        self.inner = network

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply timm's filter of published files: names of older and original ones, and position embeddings.

        Kernels keep their size, which it resamples, too: patches of another size are another network.
        """
        convert = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        try:
            converted = convert(dict(state), self.network) if convert else state
        except Exception:  # timm's filters index and reshape tensors that other files do not have
            return state
        kernels = {
            name: tensor
            for name, tensor in state.items()
            if name in converted
            and tensor.ndim == converted[name].ndim == 4
            and tensor.shape[:2] == converted[name].shape[:2]
        }
        return {**converted, **kernels}


class TimmModule(ModuleClassifier):
    """A network of any other kind, explained at its last grid."""

    rename_keys = _TimmNetwork.rename_keys


# ---- a grid of features --------------------------------------------------------------------------


class TimmClassifier(_TimmNetwork):
    """A network whose forward_features returns a grid, channels first or last."""

    def __init__(self, name: str, normalize: Normalize, network: Any) -> None:
        super().__init__(name, normalize, network)
        self.channels_last = vars(network).get("output_fmt") == "NHWC"
        pools = [module for module in network.modules() if isinstance(module, SelectAdaptivePool2d)]
        if any(pool.pool_type == "avg" for pool in pools):
            self.closed_form, self.has_dropout = _probe_head(network, self._to_native)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        features = self.inner.forward_features(self.normalize(images))
        return (features.permute(0, 3, 1, 2) if self.channels_last else features), None

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor | None]:
        """Compute the last four resolutions that timm lists. timm does not return preactivations of stages."""
        if "forward_intermediates" not in dir(self.inner):
            return super().forward_stages(images)
        features, outputs = self.inner.forward_intermediates(
            self.normalize(images),
            indices=min(_MAX_STAGES, len(self.inner.feature_info)),
            output_fmt="NCHW",
        )
        stages = tuple(Stage(output, output) for output in outputs)
        return stages, (features.permute(0, 3, 1, 2) if self.channels_last else features), None

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # an attention pool is differentiated twice
            logits: Tensor = self.inner.forward_head(self._to_native(features))
        return logits

    def _to_native(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1) if self.channels_last else features


def _probe_head(network: Any, to_native: Callable[[Tensor], Tensor]) -> tuple[Head | None, bool]:
    """Return the closed form of the head and whether it has a dropout, determined by running it on random features.

    timm's architectures use many names for the parts of a head. The input of the last layer shows what precedes it:
    the average, its layer norm, or something else.
    """
    linear = network.get_classifier()
    if not isinstance(linear, nn.Linear):
        return None, False
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, network.num_features, 2, 2, generator=generator)
    average = features.mean(dim=(2, 3))
    with eval_mode(network), torch.no_grad():
        last_input = network.forward_head(to_native(features), pre_logits=True)
        logits = network.forward_head(to_native(features))
        if last_input.ndim != 2 or not nearly_equal(logits, linear(last_input)):
            return None, False
        norm = _head_norm(network)
        if nearly_equal(last_input, average):
            head: Head = GapLinear(linear)
        elif (
            norm is not None
            and norm.normalized_shape == average.shape[1:]
            and nearly_equal(last_input, apply_norm(norm, average))
        ):
            head = GapNormLinear(norm, linear)
        else:
            return None, False
    has_dropout = getattr(network, "drop_rate", 0) > 0 or any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in network.modules()
    )
    return head, has_dropout


def _head_norm(network: nn.Module) -> nn.LayerNorm | None:
    norms = map(dict(network.named_modules()).get, ("head.norm", "fc_norm"))
    return next((norm for norm in norms if isinstance(norm, nn.LayerNorm)), None)


# ---- tokens --------------------------------------------------------------------------------------


class TimmVit(_TimmNetwork):
    """A VisionTransformer, whose features are its patch tokens as a grid [B, C, h, w].

    The context [B, T, C] is the residual stream into the last block if a class token is read, and the other tokens of
    the last block's output if tokens are pooled.
    """

    kind: ClassVar[Any] = VisionTransformer
    """Class of timm whose forward pass is split."""

    def __init__(self, name: str, normalize: Normalize, network: Any) -> None:
        super().__init__(name, normalize, network)
        self.reads_class_token = network.global_pool == "token" and network.attn_pool is None
        self.num_prefix = network.num_prefix_tokens
        if network.global_pool == "avg":
            self.closed_form, self.has_dropout = _probe_head(network, self._with_blank_prefix)

    @classmethod
    def can_split(cls, network: Any) -> bool:
        """Return whether the network can be run up to its explained layer: the last block, or its attention."""
        reads_class_token = network.global_pool == "token" and network.attn_pool is None
        is_original = type(network).forward_features is cls.kind.forward_features
        return is_original and (not reads_class_token or type(network.blocks[-1]) is Block)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, features, context = self._run(images, ())
        return features, context

    def forward_stages(self, images: Tensor) -> tuple[tuple[Stage, ...], Tensor, Tensor]:
        """Compute the patch tokens after the last block of each quarter and the network's final norm, as grids.

        A class token and registers are left out. If the class token is read, the last block runs once more for its
        other tokens.
        """
        outputs, features, context = self._run(images, stage_blocks(len(self.inner.blocks)))
        return tuple(Stage(output, output) for output in outputs), features, context

    def _run(self, images: Tensor, ends: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Compute the grids after the blocks `ends`, of which the last block is one, and the trunk's output."""
        net = self.inner
        size = self._grid_size(images)
        x, blocks = self._enter(self.normalize(images))
        outputs = []

        def grid_of(tokens: Tensor) -> Tensor:
            patches: Tensor = tokens[:, self.num_prefix :].transpose(1, 2)
            return patches.reshape(*patches.shape[:2], *size)

        for number, block in enumerate(blocks[:-1]):
            x = block(x)
            if number in ends:
                outputs.append(grid_of(net.norm(x)))
        if not self.reads_class_token:
            tokens = net.norm(blocks[-1](x))
            features = grid_of(tokens)
            return [*outputs, features], features, tokens[:, : self.num_prefix]
        if ends:
            outputs.append(grid_of(net.norm(blocks[-1](x))))
        return outputs, grid_of(net.blocks[-1].norm1(x)), x

    def _enter(self, images: Tensor) -> tuple[Tensor, Sequence[Callable[[Tensor], Tensor]]]:
        """Compute the tokens [B, T, C] that enter the first block, and return the blocks."""
        net = self.inner
        tokens = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        return tokens, list(net.blocks)

    def _grid_size(self, images: Tensor) -> tuple[int, int]:
        """Return the (height, width) of the grid of patches. Raises ConfigError if the images do not divide into it."""
        embed = self.inner.patch_embed
        size = (images.shape[-2], images.shape[-1])
        if embed.strict_img_size and embed.img_size is not None:
            require_size(self.name, images, embed.img_size)
        is_exact = isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad
        if is_exact and (size[0] % embed.patch_size[0] or size[1] % embed.patch_size[1]):
            raise ConfigError(
                f"{self.name} divides its images into patches of {embed.patch_size[0]}x{embed.patch_size[1]} pixels, "
                f"got images of {size[0]}x{size[1]}; set teacher.input_size or augment.size to a multiple of it"
            )
        grid: tuple[int, int] = embed.dynamic_feat_size(size)
        return grid

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits: Tensor = self.inner.forward_head(self._tokens(features, context))
        return logits

    def forward_pooled(self, features: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.pools_by_average:
            return super().forward_pooled(features, context)
        net = self.inner
        with sdpa_kernel(SDPBackend.MATH):
            tokens = self._tokens(features, context)
            pooled = net.forward_head(tokens, pre_logits=True)
            classifier = net.get_classifier()
            # A distilled DeiT has one for each of two tokens, and averages their outputs.
            is_single = isinstance(classifier, nn.Module)
            logits = classifier(pooled) if is_single else net.forward_head(tokens)
        return logits, to_float32(pooled)

    def _tokens(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Compute the tokens [B, T, C] after the last block and its norm."""
        assert context is not None
        net = self.inner
        patches = features.flatten(2).transpose(1, 2)
        if not self.reads_class_token:
            return torch.cat([context, patches], dim=1)
        block = net.blocks[-1]
        x = block.attn(torch.cat([block.norm1(context[:, : self.num_prefix]), patches], dim=1))
        x = context + block.drop_path1(block.ls1(x))
        tokens: Tensor = net.norm(x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))
        return tokens

    def _with_blank_prefix(self, features: Tensor) -> Tensor:
        patches = features.flatten(2).transpose(1, 2)
        return torch.cat(
            [patches.new_zeros(len(patches), self.num_prefix, patches.shape[2]), patches], 1
        )


class TimmEva(TimmVit):
    """An Eva that pools its tokens (DINOv3, EVA-02), whose blocks rotate queries and keys by their positions."""

    kind = Eva

    def _enter(self, images: Tensor) -> tuple[Tensor, Sequence[Callable[[Tensor], Tensor]]]:
        net = self.inner
        tokens, rotations = net._pos_embed(net.patch_embed(images))
        is_mixed = getattr(net, "rope_mixed", False) and rotations is not None
        blocks = [
            partial(block, rope=rotations[number] if is_mixed else rotations)
            for number, block in enumerate(net.blocks)
        ]
        return net.norm_pre(tokens), blocks


PROVIDER = Provider(build_timm, published_timm, save_for_hub, timm.list_models, _wrap)
