"""Networks of a Python program, taken as they are in memory: their checks, their identity and their copy.

The identity is the digest of the state, and that of the code: of the classes of all modules, and of the functions,
classes and constants of the user that these name. Comments and the layout of the code do not count.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from permafrost.config.models import MEMORY, MODELS, MemoryModelConfig
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import Classifier, Normalize, Provider
from permafrost.models.cost import sha256_tensors
from permafrost.models.module import ModuleClassifier, logits_in, unwrapped
from permafrost.models.providers import model_normalization, provider_of

logger = logging.getLogger("permafrost.models")

_INSTALLED = tuple(
    os.path.join(os.path.realpath(folder), "")  # noqa: PTH118, compared as text
    for folder in {*sysconfig.get_paths().values(), os.path.dirname(torch.__path__[0])}  # noqa: PTH120
)
_CONSTANTS = (bool, int, float, complex, str, bytes, tuple, type(None))


_SIDES = (224, 64, 32)
"""Sides in pixels of an image on which the outputs of a network are counted, as far as it takes such ones."""


def options_of_network(
    network: nn.Module, argument: str, is_frozen: bool, side: int | None
) -> dict[str, Any]:
    """Return the options of `kind: memory` that identify a network.

    Args:
        network: The network, whose state is read from one device.
        argument: Name of the argument, for messages.
        is_frozen: True for one that is not trained, which has to be in eval mode.
        side: Side in pixels of its images, None if it is not known.

    Raises:
        ConfigError: If it cannot be a network of a store.
    """
    name = type(network).__name__
    where = f"{argument}={name}(...)"
    tensors = [*network.parameters(), *network.buffers()]
    require(
        bool(tensors), f"{where} has no parameters and no buffers, so nothing in it was trained"
    )
    devices = sorted({str(tensor.device) for tensor in tensors})
    require(
        len(devices) == 1 and devices != ["meta"],
        f"{where} has tensors on {', '.join(devices)}; move all of them to one device that holds values, as in "
        f"{argument}.to('cpu')",
    )
    require(
        not (is_frozen and network.training),
        f"{where} is in train mode, in which dropout and batch norm depend on the batch; call {argument}.eval()",
    )
    code = digest_code(network)
    if code is None:
        logger.warning(
            "the code of %s is in no file and cannot be read, so the network is identified by its weights alone",
            name,
        )
    normalizes = isinstance(network, Classifier)  # its images itself
    return {
        "kind": "memory",
        "name": name,
        "weights": f"{MEMORY}:{sha256_tensors(network)}",
        "code": code,
        "classes": _count_outputs(network, _SIDES if side is None else (side,)),
        **({"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]} if normalizes else {}),
    }


@torch.no_grad()
def _count_outputs(network: nn.Module, sides: Iterable[int]) -> int | None:
    """Return the number of logits, None if the network does not run on an image of any of these sides."""
    weights = next(network.parameters(), torch.empty(0))
    for side in sides:
        with suppress(Exception):  # which the pass will say
            returned: Any = deepcopy(network)(torch.zeros(2, 3, side, side).to(weights))
            return int(logits_in(returned).shape[1])
    return None


def warn_of_changed_module(folder: Path, config: MemoryModelConfig) -> None:
    """Log that the code of a network in memory is not that of the training whose weights it gets."""
    if config.network is not None and digest_code(config.network) != config.code:
        logger.warning(
            "%s was trained with other code of %s than that of this network: what it computes may be something else",
            folder,
            config.name,
        )


def stateful(network: nn.Module) -> nn.Module:
    """Return the module whose state is saved: without wrappers, and of a network of permafrost its provider's."""
    return network.network if isinstance(network, Classifier) else unwrapped(network, "")[0]


def build_memory(config: MemoryModelConfig, outputs: int) -> Classifier:
    """Copy the network of the options, on the CPU.

    Raises:
        ConfigError: If the options name a network of another process, or it has no such layer.
    """
    config.resolve("network", "", None)  # raises
    try:
        copied = deepcopy(config.network).cpu().float()
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{config.name} cannot be copied ({error}); detach the tensors that it keeps, or name a function that "
            "builds it (kind=module)"
        ) from error
    if isinstance(copied, Classifier):
        return copied
    library = type(copied).__module__.partition(".")[0]
    if (
        library in MODELS and not config.layer
    ):  # torchvision or timm, whose networks have known stages
        wrap = provider_of(MODELS[library]()).wrap
        if wrap is not None:
            with suppress(KeyError, ConfigError):
                return wrap(config, copied)
    normalize = Normalize(*model_normalization(config))
    return ModuleClassifier(copied, config.layer, normalize, config.returns, layout=config.layout)


PROVIDER = Provider(build_memory, lambda config: None)


# ---- code ------------------------------------------------------------------------------------------


def digest_code(network: nn.Module) -> str | None:
    """Return the SHA-256 of a network's code, without installed packages; None if some of it cannot be read."""
    texts: dict[str, str] = {}
    waiting: list[Any] = [type(module) for module in network.modules()]
    waiting += [
        vars(module)["forward"] for module in network.modules() if "forward" in vars(module)
    ]
    try:
        while waiting:
            part = inspect.unwrap(waiting.pop())
            name = f"{part.__module__}.{part.__qualname__}"
            if name not in texts and not _is_installed(part):
                texts[name] = ""
                waiting += _parts_of(part, name, texts)
    except (OSError, TypeError, SyntaxError):
        return None
    return sha256_json(texts)


def _is_installed(part: Any) -> bool:
    """Return whether a class or function is of the standard library, of an installed package, or of no file."""
    if part.__module__.partition(".")[0] == "permafrost":
        return True
    if isinstance(part, type):
        functions = [value for value in vars(part).values() if isinstance(value, FunctionType)]
        return all(map(_is_installed, functions)) and part.__module__ != "__main__"
    return bool(os.path.realpath(part.__code__.co_filename).startswith(_INSTALLED))


def _parts_of(part: Any, name: str, texts: dict[str, str]) -> Iterator[Any]:
    """Yield the classes and functions that a class or function names; add its text and constants to `texts`."""
    if isinstance(part, type):
        yield from part.__bases__
        for key, value in sorted(vars(part).items()):
            member = (
                value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            )
            if isinstance(member, FunctionType):
                yield member
            elif isinstance(value, _CONSTANTS) and not key.startswith("__"):
                texts[f"{name}.{key}"] = repr(value)
        return
    texts[name] = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(part))))
    names = _names_in(part.__code__)
    scope = {**part.__globals__, **inspect.getclosurevars(part).nonlocals}
    values = {key: scope[key] for key in names if key in scope}
    for module in [value for value in values.values() if isinstance(value, ModuleType)]:
        values |= {f"{module.__name__}.{key}": getattr(module, key, None) for key in names}
    for key, value in sorted(values.items()):
        if isinstance(value, (type, FunctionType)):
            yield value
        elif isinstance(value, _CONSTANTS) and "." not in key:
            texts[f"{part.__module__}.{key}"] = repr(value)


def _names_in(code: CodeType) -> set[str]:
    """Return the names that a code object and those inside of it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*map(_names_in, inner))
