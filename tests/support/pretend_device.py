"""A pretended accelerator: values lie in CPU memory, but mixing its tensors with the CPU's raises as on a GPU.

``install()`` registers the device "pretend" with torch as its backend for devices of others (PrivateUse1), and changes
torch for the whole process: only programs of their own may call it, such as ``pretend_job.py``. Scalars, and the
indices of ``tensor[index]``, may come from the CPU, as they may on CUDA. ``inference_mode`` becomes ``no_grad`` because
tensors of another class cannot be made in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
FREE_BYTES, TOTAL_BYTES = 2**30, 2**31
CPU = torch.device("cpu")
MAY_TAKE_CPU_INDICES = ("aten.index.", "aten.index_put", "aten._index_put")
_LIBRARY = torch.library.Library("aten", "IMPL")  # kernels hold as long as their library
_REST = torch.library.Library("_", "IMPL")
IN_LOW_PRECISION = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "scaled_dot_product_attention")
OF_OTHER_MEMORY = ("pin_memory", "non_blocking")


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the pretended device; ``held`` is where its values are."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        assert not isinstance(held, OnDevice)
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @property
    def data(self) -> torch.Tensor:
        """The same values without a history; may be given other values, which torch would put past ``held``."""
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        assert isinstance(other, OnDevice) and other.shape == self.shape and other.dtype == self.dtype
        self.held = other.held

    def tolist(self) -> Any:
        """The values as Python has them: torch's own reads memory that wrappers lack."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


class Placed(TorchDispatchMode):
    """Sends what makes or moves tensors, such as ``torch.zeros(..., device="pretend")``, through the same rules."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operation of torch, where its tensors lie."""
    kwargs = {key: value for key, value in kwargs.items() if key not in OF_OTHER_MEMORY}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    device = kwargs.get("device")
    goes_there = bool(ours) if device is None else torch.device(device).type == NAME
    if func is torch.ops.aten.copy_.default:
        func(bare(args[0]), bare(args[1]))
        return args[0]
    if func is not torch.ops.aten._to_copy.default:
        refuse_mixtures(str(func), tensors)
    if device is not None and goes_there:
        kwargs["device"] = CPU
    result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if not goes_there:
        return result
    same = {id(tensor.held): tensor for tensor in ours}  # what is changed in place is the tensor that went in

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        found = same.get(id(value))
        assert found is None or found.shape == value.shape, f"{func} changes the shape of a tensor in place"
        return OnDevice(value) if found is None else found

    return tree_map(wrapped, result)


def bare(value: Any) -> Any:
    """The values of a tensor of the device; anything else as it is."""
    return value.held if isinstance(value, OnDevice) else value


def refuse_mixtures(operation: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError, as torch does on a GPU, for tensors of the device beside others of the CPU."""
    on_cpu = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    is_mixed = on_cpu and any(isinstance(tensor, OnDevice) for tensor in tensors)
    if is_mixed and not operation.startswith(MAY_TAKE_CPU_INDICES):
        raise RuntimeError(f"{operation}: expected all tensors on one device, but {on_cpu} are on the CPU")


def empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_where: Any) -> torch.Tensor:
    """Room on the device."""
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def empty(size: Sequence[int], *, dtype: Any = None, **_where: Any) -> torch.Tensor:
    """Room on the device, one element beside the other."""
    return OnDevice(torch.empty(size, dtype=dtype))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Values from or to the device."""
    bare(target).copy_(bare(source))
    return target


class PretendedStream:
    """Work is done when it is asked for, so that there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device(NAME, 0)

    def wait_stream(self, _stream: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or PretendedEvent()


class PretendedEvent:
    """Has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, _stream: Any = None) -> None: ...

    def wait(self, _stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Backend:
    """The module ``torch.pretend``, as far as torch and our packages ask it. ``num_synchronised`` counts waits."""

    Stream, Event = PretendedStream, PretendedEvent

    def __init__(self) -> None:
        self.num_synchronised = 0
        self._generator = torch.Generator()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None: ...

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, _device: Any) -> None: ...

    def synchronize(self, _device: Any = None) -> None:
        self.num_synchronised += 1

    def current_stream(self, _device: Any = None) -> PretendedStream:
        return PretendedStream()

    def stream(self, _stream: PretendedStream) -> AbstractContextManager[None]:
        return nullcontext()

    def manual_seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return self._generator.get_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        self._generator.set_state(state)

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        return FREE_BYTES, TOTAL_BYTES

    def max_memory_allocated(self, _device: Any = None) -> int:
        return TOTAL_BYTES - FREE_BYTES

    def reset_peak_memory_stats(self, _device: Any = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def in_low_precision(name: str) -> Callable[..., Any]:
    """What an operation does under autocast: as on the CPU, its operands are rounded first."""
    operation = getattr(torch.ops.aten, name).default
    key = torch._C._dispatch_key_parse("AutocastPrivateUse1")

    def rounded(value: Any) -> Any:
        is_wide = isinstance(value, OnDevice) and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype(NAME)) if is_wide else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operation(*tree_map(rounded, args), **tree_map(rounded, kwargs))

    return run


def install() -> Backend:
    """Make the device known to torch, in this process and for good."""
    backend = Backend()
    _setup_privateuseone_for_python_backend(NAME, backend_module=backend)
    # What torch makes and fills inside its own code passes by the mode above.
    kernels = {"empty_strided": empty_strided, "empty.memory_format": empty, "_copy_from": copy_from}
    for name, made in kernels.items():
        _LIBRARY.impl(name, made, "PrivateUse1")
    for name in IN_LOW_PRECISION:
        _LIBRARY.impl(name, in_low_precision(name), "AutocastPrivateUse1")
    _REST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    replaced: Callable[..., Any] = torch.no_grad
    torch.inference_mode = replaced  # type: ignore[misc, assignment]
    return backend
