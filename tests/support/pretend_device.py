"""A fake torch device that computes on the CPU and, like a GPU, refuses operands of another device.

Its tensors wrap CPU tensors, and every operation runs on those, so results differ from the CPU's in rounding only. It
uses torch's only slot for other devices, for the whole process: import it in a separate process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps parameters, and so ties, as for a GPU
DEVICE = torch.device(NAME, 0)

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPYING = {"aten::copy_", "aten::_to_copy"}
_WAITING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}

waits: list[str] = []
"""Operations whose result the CPU reads, for which it would wait for a GPU, in order."""


class Pretend(Tensor):
    """A tensor on the fake device.

    Args:
        cpu_tensor: the CPU tensor.
    """

    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> "Pretend":
        tensor: Pretend = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            layout=cpu_tensor.layout,
            device=DEVICE,
        )
        tensor.cpu_tensor = cpu_tensor
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.cpu_tensor.tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretend) or (new.shape, new.dtype) != (self.shape, self.dtype):
            raise RuntimeError(f"{new.dtype} {tuple(new.shape)} of {new.device} is set as the data of another tensor")
        self.cpu_tensor = new.cpu_tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    for place, operand in enumerate(tree_leaves((args, kwargs))):
        if not isinstance(operand, Tensor) or isinstance(operand, Pretend) or not operand.dim() or name in _COPYING:
            continue
        if name not in _INDEXING or place == 0:  # a GPU takes indices of the CPU
            raise RuntimeError(f"{name} is given {tuple(operand.shape)} of {operand.device} beside tensors of {DEVICE}")
    target = torch.device(kwargs.get("device") or DEVICE)
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    operands = {
        id(operand.cpu_tensor): operand for operand in tree_leaves((args, kwargs)) if isinstance(operand, Pretend)
    }
    out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if target.type == "cpu" or name in _WAITING:
        waits.append(name)
    if target.type == "cpu":
        return out

    def wrap(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        return operands[id(result)] if id(result) in operands else Pretend(result)

    return tree_map(wrap, out)


def _unwrap(operand: Any) -> Any:
    return operand.cpu_tensor if isinstance(operand, Pretend) else operand


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _unwrap(target).copy_(_unwrap(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name, _function in (
    ("empty.memory_format", _empty),
    ("empty_strided", _empty_strided),
    ("_copy_from", _copy_from),
):
    _LIBRARY.impl(_name, _function, "PrivateUse1")
