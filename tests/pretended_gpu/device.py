"""A pretended GPU: tensors on cuda:0 whose values a CPU computes.

Their device is CUDA's in C++, too, so autocast, scaler, streams and the autograd engine take their CUDA branches, and
values are real. What mixes devices raises as on a GPU. `RECORD` has what the host waits for, launches and copies.
There are no kernels, no speed, no races of streams and no second device.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended_gpu.extension import load_extension

DEVICE = torch.device("cuda:0")
NAME = "Pretended GPU"
_PINNED: dict[int, int] = {}
"""Bytes of pinned memory by address."""
_WAITING = {
    "_local_scalar_dense": "a value is read",
    "is_nonzero": "a value is read",
    "equal": "tensors are compared",
    "nonzero": "a number of elements is read",
    "masked_select": "a number of elements is read",
    "_unique2": "a number of elements is read",
    "unique_dim": "a number of elements is read",
    "unique_consecutive": "a number of elements is read",
    "repeat_interleave": "a number of elements is read",
    "bincount": "a number of elements is read",
    "_linalg_check_errors": "an error is looked for",
    "_linalg_eigh": "an error is looked for",
    "_linalg_svd": "an error is looked for",
}
"""Operations that wait for their operands."""
_UNREPEATABLE = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "max_pool3d_with_indices_backward",
    "nll_loss2d_backward",
    "put_",
    "reflection_pad2d_backward",
    "upsample_bicubic2d_backward",
}
"""Operations that add with atomics on CUDA, and of which torch warns where it is asked for fixed orders."""
_REPLACED = {
    *("convolution_backward", "index_add", "index_add_", "index_put", "index_put_", "scatter_add"),
    *(
        "scatter_add_",
        "scatter_reduce",
        "replication_pad2d_backward",
        "upsample_bilinear2d_backward",
    ),
}
"""Operations that may do so, and that have a fixed order where torch is asked for it."""
_NO_LAUNCH = {
    *("view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("alias", "detach", "as_strided", "_unsafe_view", "unbind", "split", "split_with_sizes"),
    *("chunk", "_reshape_alias", "diagonal", "unfold", "view_as", "lift", "lift_fresh", "empty"),
    *("empty_like", "new_empty", "empty_strided", "new_empty_strided", "set_", "record_stream"),
    *("is_same_size", "_has_compatible_shallow_copy_type", "is_pinned", "_pin_memory", "dim"),
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
_CONVOLUTIONS = {"convolution", "convolution_backward"}


@dataclass
class Record:
    """Waits, launches and copies that the host has asked for."""

    waits: list[tuple[str, str, str]] = field(default_factory=list)
    """Reason, line and thread of each wait."""
    launches: Counter[str] = field(default_factory=Counter)
    """Operations by name, without views and allocations."""
    uploads: list[tuple[int, str]] = field(default_factory=list)
    """Bytes and line of each copy to the device."""
    downloads: list[int] = field(default_factory=list)
    """Bytes of each copy from the device."""
    unrepeatable: Counter[str] = field(default_factory=Counter)
    """Operations whose sums have no fixed order."""

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def wait(self, reason: str) -> None:
        """Note that the host waits."""
        self.waits.append((reason, _line(), threading.current_thread().name))


RECORD = Record()


class MixedDevicesError(RuntimeError):
    """Operands that are on two devices, which no kernel takes."""


def _line() -> str:
    """Return the innermost line of this project's pipeline, or of anything but torch and this folder."""
    frame, other = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/pipeline/" in name:
            return f"{name.rpartition('/pipeline/')[2]}:{frame.f_lineno}"
        if not other and "/torch/" not in name and "/pretended_gpu/" not in name:
            other = f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "the backward pass"


# ---- tensor --------------------------------------------------------------------------------------


class DeviceTensor(Tensor):
    """A tensor on cuda:0; `host` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.host})"

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        RECORD.wait("values are read")
        return self.host.tolist()

    def storage(self) -> Any:
        return self.host.storage()

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.detach().clone().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = DeviceTensor(self.host.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        copied.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in ("host",)}
        )
        memo[id(self)] = copied
        return copied


def _host(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in _PINNED


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values of its operands, as the device would."""
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    reads_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    device = kwargs.get("device")
    on_device = _is_cuda(device) if device is not None else reads_device
    if name == "is_pinned":
        return False
    if name in ("copy_", "_to_copy"):
        _record_copy(name, args, kwargs, on_device)
    elif reads_device:
        _require_one_device(function, name, args, tensors)
        _record(name, args)
    host_kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if device is not None:
        host_kwargs["device"] = torch.device("cpu")
    host_args = tree_map(_host, args)
    if reads_device and _rounds_to_tf32(name):
        host_args = tree_map(_to_tf32, host_args)
    results = function(*host_args, **tree_map(_host, host_kwargs))
    if name == "copy_":
        return args[0]
    if not on_device or name == "_local_scalar_dense":
        return results
    operands = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}

    def on_cuda(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return operands[id(value)] if id(value) in operands else DeviceTensor(value)

    return tree_map(on_cuda, results)


def _record(name: str, args: Any) -> None:
    if name not in _NO_LAUNCH:
        RECORD.launches[name] += 1
    is_free = name in _REPLACED and not torch.are_deterministic_algorithms_enabled()
    if (is_free or name in _UNREPEATABLE) and _adds_floats(args):  # sums of integers are exact
        RECORD.unrepeatable[name] += 1
    if name in _WAITING:
        RECORD.wait(_WAITING[name])
    if name.lstrip("_").startswith(("index", "unsafe_index")) and isinstance(args[1], list | tuple):
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            RECORD.wait("a mask selects elements")
        if not all(isinstance(index, DeviceTensor) for index in indices):
            RECORD.wait("indices are copied")


def _adds_floats(args: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args))


def _record_copy(name: str, args: Any, kwargs: dict[str, Any], on_device: bool) -> None:
    """Record a copy between host and device, or one on the device."""
    if name == "copy_":
        target, source = isinstance(args[0], DeviceTensor), args[1]
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        target, source, asynchronous = on_device, args[0], kwargs.get("non_blocking", False)
    if target and isinstance(source, DeviceTensor):
        RECORD.launches[name] += 1
    elif target:
        RECORD.uploads.append((source.nbytes, _line()))
        pinned = _is_pinned(source)
        if not (asynchronous and pinned):
            RECORD.wait("upload" if pinned else "upload from pageable memory")
    elif isinstance(source, DeviceTensor):
        RECORD.downloads.append(source.nbytes)
        # The memory of a new copy is pinned if it is asynchronous.
        if not (asynchronous and (name == "_to_copy" or _is_pinned(args[0]))):
            RECORD.wait("download")


def _require_one_device(function: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise MixedDevicesError as CUDA does: numbers of the host are operands of pointwise operations only."""
    others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if name.lstrip("_").startswith(("index", "unsafe_index")) and isinstance(args[1], list | tuple):
        values = args[2:3] if len(args) > 2 else ()
        others = [
            tensor
            for tensor in (args[0], *values)
            if isinstance(tensor, Tensor) and not isinstance(tensor, DeviceTensor)
        ]
    if name in ("set_", "is_same_size", "_has_compatible_shallow_copy_type"):
        return
    takes_numbers = torch.Tag.pointwise in function.tags or name.startswith(("_foreach", "index"))
    writes_host = name.endswith("_") and not isinstance(args[0], DeviceTensor | list | tuple)
    mixed = [tensor for tensor in others if tensor.dim() > 0 or not takes_numbers]
    if mixed or (writes_host and others):
        shape = tuple((mixed or others)[0].shape)
        raise MixedDevicesError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}, a tensor {shape} of the host, {_line()})"
        )


# ---- numbers -------------------------------------------------------------------------------------


def _rounds_to_tf32(name: str) -> bool:
    """Return whether the settings of torch let an operation of float32 have the 10 bits of TF32."""
    if name in _CONVOLUTIONS:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return name in _PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _to_tf32(value: Any) -> Any:
    """Round the operands of a product to 10 bits, half to even, as tensor cores do."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() < 2:
        return value
    bits = value.detach().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


# ---- installation --------------------------------------------------------------------------------


class _DeviceMode(TorchDispatchMode):
    """Creation of tensors on the device, and copies to it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")) or any(
            isinstance(leaf, DeviceTensor) for leaf in tree_leaves((args, kwargs))
        ):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


class _Stream:
    device, device_index, cuda_stream = DEVICE, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        RECORD.wait("a stream is synchronized")

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        RECORD.wait("an event is synchronized")

    def elapsed_time(self, end: Any) -> float:
        return 1.0


def _pinned_copy(tensor: Tensor, device: Any = None) -> Tensor:
    if isinstance(tensor, DeviceTensor):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )
    copied = tensor.detach().clone(memory_format=torch.preserve_format)
    address = copied.untyped_storage().data_ptr()
    _PINNED[address] = copied.nbytes
    weakref.finalize(copied, _PINNED.pop, address, None)
    return copied


_threads = threading.local()


def enter_thread() -> None:
    """Let this thread create tensors on the device."""
    if getattr(_threads, "mode", None) is None:
        _threads.mode = _DeviceMode()
        _threads.mode.__enter__()


def install() -> None:
    """Give this process a pretended GPU, for good."""
    load_extension().install()
    cuda = torch.cuda
    answers: dict[str, Any] = {
        **{"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0},
        **{"get_device_name": NAME, "get_device_capability": (9, 0), "is_bf16_supported": True},
        **{"init": None, "_lazy_init": None, "set_device": None, "empty_cache": None},
        **{"memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None},
        **{"_is_in_bad_fork": False, "manual_seed_all": None, "mem_get_info": (2**36, 2**36)},
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.synchronize = lambda *_: RECORD.wait("the device is synchronized")
    cuda.Stream, cuda.Event = _Stream, _Event  # type: ignore[misc, assignment]
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()  # type: ignore[assignment]
    cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.random.manual_seed_all = cuda.manual_seed_all
    cuda.default_generators = (torch.Generator(),)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(module)._foreach_supported_types.append(DeviceTensor)
    for enable in ("flash", "mem_efficient", "cudnn"):  # whose kernels no CPU has
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(False)
    torch.backends.cudnn.is_available = lambda: True
    torch.backends.cudnn.version = lambda: 92600
    torch._C._set_only_lift_cpu_tensors(True)
    Tensor.pin_memory = _pinned_copy  # type: ignore[method-assign, assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _load_to_device()
    enter_thread()
    run = threading.Thread.run

    def run_on_device(thread: threading.Thread) -> None:
        enter_thread()
        run(thread)

    threading.Thread.run = run_on_device  # type: ignore[method-assign]


def _load_to_device() -> None:
    """Let torch.load put tensors on the device."""
    load = torch.load

    def load_to(file: Any, map_location: Any = None, **options: Any) -> Any:
        is_device = isinstance(map_location, str | torch.device) and _is_cuda(map_location)
        values = load(file, map_location="cpu" if is_device else map_location, **options)
        if not is_device:
            return values
        return tree_map(
            lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) else leaf, values
        )

    torch.load = load_to


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """Provide the record of the block alone."""
    RECORD.clear()
    yield RECORD
