"""Networks of transformers: its image classifiers, embeddings with a new head, and CLIP with a head of texts.

All are explained as networks of one's own are (models/module.py). The code of a hub is never run, and weights are read
from safetensors only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as _CLASSIFIERS,
)
from transformers.utils import logging as log

from permafrost.config.models import is_published
from permafrost.core.errors import UserError, first_line, require
from permafrost.models.classifier import (
    Classifier,
    Normalize,
    PretrainedInfo,
    Provider,
    WeightsError,
    eval_mode,
)
from permafrost.models.module import ModuleClassifier
from permafrost.models.providers import model_normalization
from permafrost.storage.files import file_at, iter_lines
from permafrost_transformers.options import TransformersModelConfig
from permafrost_transformers.processors import read_processor

_BATCH = 256
"""Number of texts in a forward pass."""
_FILES = ("*.json", "*.txt", "*.model")
"""Files of the hub besides weights: configurations, and vocabularies of tokenizers."""
_REFUSED = {
    "timm_wrapper": "is a network of timm; set teacher=timm teacher.name=hf-hub:<id>, or local-dir:<folder>",
    "vit_mae": "masks patches at random; set teacher=timm teacher.name=vit_base_patch16_224.mae, or name another",
    "siglip2": "takes patches of any resolution (NaFlex); name SigLIP 2 of one size, whose model_type is siglip",
    "perceiver": "has no features of image places; name another network",
}
"""Values of model_type, and why they cannot be followed."""
_REASONS: dict[type[Exception], str] = {
    hub_errors.GatedRepoError: "is gated; accept its terms on its page at huggingface.co, and set HF_TOKEN to a token "
    "of that account",
    hub_errors.RevisionNotFoundError: "has no such revision; correct weights=pretrained:<branch, tag or commit>",
    hub_errors.RepositoryNotFoundError: "is neither a folder nor an id of the Hugging Face hub; correct name=, or set "
    "HF_TOKEN if it is private",
    hub_errors.HFValidationError: "is neither a folder nor an id of the Hugging Face hub; correct name=",
    hub_errors.LocalEntryNotFoundError: "is not in the local cache, and the hub does not answer or HF_HUB_OFFLINE=1 is "
    "set; connect, or copy the network's folder to this machine and set name= to it",
    hub_errors.OfflineModeIsEnabled: "cannot be fetched with HF_HUB_OFFLINE=1; unset it, or set name= to a folder",
}
"""Errors of the hub, the more special first, and what they mean for a network."""


# ---- building ------------------------------------------------------------------------------------


def build_transformers(config: TransformersModelConfig, outputs: int) -> Classifier:
    """Build the network with published weights for `weights: pretrained`, otherwise with new ones.

    If the published head has another number of outputs, or there is none, a new one is initialized.

    Raises:
        ConfigError: If the network is not one of images alone that can be followed.
        WeightsError: If its files cannot be fetched or read.
    """
    folder, settings = _open(config, (*_FILES, "model.safetensors", "model-*-of-*.safetensors"))
    with _reading(config):
        if _has_head(settings):
            if settings.num_labels != outputs:
                settings.num_labels = outputs
            network: nn.Module = _load(AutoModelForImageClassification, config, folder, settings)
        else:
            network = _with_head(
                config, folder, _load(AutoModel, config, folder, settings), outputs
            )
    normalize = Normalize(*model_normalization(config))
    return ModuleClassifier(
        network,
        config.layer,
        normalize,
        layout=config.layout,
        may_initialize=config.weights is None,
    )


def published_transformers(config: TransformersModelConfig) -> PretrainedInfo:
    """Return the facts about a network's folder, with those of its image processor unless options replace it.

    Raises:
        ConfigError: If the configuration or the processor cannot be followed.
        WeightsError: If they cannot be fetched.
    """
    folder, settings = _open(config, _FILES)
    outputs = settings.id2label or {}
    names, prompts = tuple(str(outputs[key]) for key in sorted(outputs)), _read_prompts(config)
    has_head = _has_head(settings)
    require(
        not (has_head and prompts),
        f"prompts={config.prompts}: {config.name} is a classifier, which reads no texts; leave the option out",
    )
    info = PretrainedInfo(
        name="" if Path(config.name).is_dir() else folder.name,
        classes=settings.num_labels if has_head else len(prompts),
        input_size=config.input_size or 0,
        fixed_size=False,
        mean=config.mean or (),
        std=config.std or (),
        # LABEL_0 is what the library calls a class without a name.
        labels=names if has_head and not re.fullmatch(r"(LABEL_\d+ ?)+", " ".join(names)) else (),
        prompts=prompts,
    )
    is_prepared = config.input_size is not None and config.frame != "auto"
    if config.mean and (is_prepared or not is_published(config.weights)):
        return info
    with _reading(config):
        return read_processor(folder, info, config.name)


def _has_head(settings: Any) -> bool:
    """Return whether the network has a head for classes: by the class that saved it, where this is known."""
    names = " ".join(settings.architectures or ["ForImageClassification"])
    return "ForImageClassification" in names and type(settings) in _CLASSIFIERS


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(config: TransformersModelConfig) -> Iterator[None]:
    """Say in one line why a network cannot be fetched, read or run, without the library's own reports."""
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises many types of them
        reasons = [
            *(reason for kind, reason in _REASONS.items() if isinstance(error, kind)),
            f"cannot be read as a network of images alone by transformers {transformers.__version__} "
            f"({first_line(error)}); name another, or save it again by save_pretrained",
        ]
        raise WeightsError(f"name={config.name} {reasons[0]}") from error
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()


@functools.cache
def _fetch(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Return the folder of the hub's files in the local cache, whose name is the commit."""
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*files]))


def _open(config: TransformersModelConfig, files: tuple[str, ...]) -> tuple[Path, Any]:
    """Return the folder of a network, or of its copy from the hub, and its configuration."""
    revision = (config.weights or "").partition(":")[2] if is_published(config.weights) else ""
    folder = Path(config.name)
    require(
        bool(config.name) and not (revision and folder.is_dir()),
        f"kind=transformers, name={config.name}, weights={config.weights}: name a folder of save_pretrained, or an id "
        "of the Hugging Face hub; only an id has revisions",
    )
    with _reading(config):
        if not folder.is_dir():
            folder = _fetch(
                config.name, revision or None, files if is_published(config.weights) else _FILES
            )
        values, _ = transformers.PreTrainedConfig.get_config_dict(str(folder))
        kind = "timm_wrapper" if "pretrained_cfg" in values else values.get("model_type")
        require(
            kind in CONFIG_MAPPING or "auto_map" not in values,
            f"{config.name} runs code of its own (auto_map in config.json), which permafrost never does; name a "
            "network that transformers itself has, or build it in a function of yours (teacher=module)",
        )
        require(kind not in _REFUSED, f"{config.name} {_REFUSED.get(kind)}")
        return folder, AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def _load(kind: Any, config: TransformersModelConfig, folder: Path, settings: Any) -> Any:
    """Return the network with the weights of the folder, all of them but those of a head for other classes."""
    if is_published(config.weights):
        require(
            any(folder.glob("model*.safetensors")),
            f"{config.name} has no model.safetensors, and permafrost does not read pickled weights; if you trust them, "
            f"transformers.{kind.__name__}.from_pretrained({config.name!r}).save_pretrained('folder') converts them",
        )
        network, report = kind.from_pretrained(
            str(folder),
            config=settings,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        wrong = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
        if len(wrong) < len(report["missing_keys"]):  # a network that was trained without it
            network.pooler = None
        wrong |= {
            name for name, _, shape in report["mismatched_keys"] if shape[0] != settings.num_labels
        }
        require(
            not wrong,
            f"{config.name} lacks {len(wrong)} tensors of {type(network).__name__}, or has them in other shapes, such "
            f"as {min(wrong, default='')}; save the network again with all of its weights",
        )
    else:
        network = kind.from_config(settings, trust_remote_code=False).float()
    tower = getattr(network, "vision_model", network)
    if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        # Images of the network's own size are not affected.
        tower.forward = functools.partial(tower.forward, interpolate_pos_encoding=True)
    return network


# ---- networks without a head ---------------------------------------------------------------------


class EmbeddingNetwork(nn.Module):
    """The image tower of a network, and a linear layer on its embedding, which may be scaled to unit length first."""

    def __init__(self, network: Any, *, is_unit: bool) -> None:
        super().__init__()
        self.network = getattr(network, "vision_model", network)
        self.projection = getattr(network, "visual_projection", nn.Identity())
        self.head: Any = nn.Identity()
        self.is_unit = is_unit
        names = [name for name, _ in self.network.named_parameters()]
        self.has_class_token = any(
            name.endswith(("cls_token", "class_embedding")) for name in names
        )

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        embedding = output.get("pooler_output")
        if embedding is None:
            places = output.last_hidden_state  # [B, C, h, w] or tokens [B, N, C]
            places = places.flatten(2).mT if places.ndim == 4 else places
            is_first = output.last_hidden_state.ndim == 3 and self.has_class_token
            embedding = places[:, 0] if is_first else places.mean(dim=1)
        embedding = self.projection(embedding.flatten(1))
        logits: Tensor = self.head(F.normalize(embedding, dim=-1) if self.is_unit else embedding)
        return logits


@torch.no_grad()
def _with_head(
    config: TransformersModelConfig, folder: Path, network: Any, outputs: int
) -> EmbeddingNetwork:
    """Return the network with a head: of its texts, or a new one; none for no outputs."""
    prompts = _read_prompts(config)
    require(
        not prompts or hasattr(network, "logit_scale"),
        f"prompts={config.prompts} needs CLIP or SigLIP, and {config.name} is {type(network).__name__}; leave it out",
    )
    embedding = EmbeddingNetwork(network, is_unit=bool(prompts))
    size = getattr(embedding.network.config, "image_size", None) or 224
    with eval_mode(embedding):
        example = torch.zeros(1, 3, *((size, size) if isinstance(size, int) else size))
        width = embedding(example).shape[1]
    if outputs:
        embedding.head = nn.Linear(width, outputs)
    if is_published(config.weights) and prompts and len(prompts) == outputs:
        with eval_mode(network):
            texts = F.normalize(_read_texts(network, folder, prompts), dim=-1)
        embedding.head.weight.copy_(texts * network.logit_scale.exp())
        embedding.head.bias.fill_(float(getattr(network, "logit_bias", 0)))
    return embedding


def _read_prompts(config: TransformersModelConfig) -> tuple[str, ...]:
    if config.prompts is None:
        return ()
    path = Path(config.prompts)
    require(
        path.is_file(),
        f"prompts={path} does not exist; name a text file with a line for each class",
    )
    prompts = tuple(filter(None, map(str.strip, iter_lines(path, f"prompts={path}"))))
    require(
        len(set(prompts)) == len(prompts),
        f"prompts={path} has equal lines; write a line for each class",
    )
    return prompts


def file_digests(config: TransformersModelConfig) -> dict[str, str]:
    """Return the SHA-256 of the file of texts and of a folder's configuration, by option and name."""
    files = {
        "prompts": Path(config.prompts or ""),
        "config.json": Path(config.name) / "config.json",
    }
    return {name: file_at(path).sha256() for name, path in files.items() if path.is_file()}


def _read_texts(network: Any, folder: Path, prompts: tuple[str, ...]) -> Tensor:
    """Return the embeddings [K, d] of the texts. SigLIP was trained on texts that are padded to its full length."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    tokens = tokenizer(
        list(prompts),
        return_tensors="pt",
        truncation=True,
        padding="max_length" if network.config.model_type == "siglip" else True,
        max_length=network.config.text_config.max_position_embeddings,
    )
    batches = zip(*(tensor.split(_BATCH) for tensor in tokens.values()), strict=True)
    outputs = (
        network.get_text_features(**dict(zip(tokens, batch, strict=True))) for batch in batches
    )
    return torch.cat([output.pooler_output for output in outputs])


PROVIDER = Provider(build_transformers, published_transformers)
