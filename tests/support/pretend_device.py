"""A device that computes on the CPU and refuses, as a GPU does, operands of another device.

Its tensors wrap CPU tensors; every operation is done on what they hold, so results differ from the CPU's in rounding
only. It takes torch's one place for other devices, for the whole process: import it in a process of its own.
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
"""Operations whose result the CPU sees, for which it would wait for a GPU; in their order."""


class Pretend(Tensor):
    """A tensor of the device.

    Args:
        held: the CPU tensor.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretend":
        made: Pretend = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretend) or (new.shape, new.dtype) != (self.shape, self.dtype):
            raise RuntimeError(f"{new.dtype} {tuple(new.shape)} of {new.device} is set as the data of another tensor")
        self.held = new.held


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    for place, operand in enumerate(tree_leaves((args, kwargs))):
        if not isinstance(operand, Tensor) or isinstance(operand, Pretend) or not operand.dim() or name in _COPYING:
            continue
        if name not in _INDEXING or place == 0:  # a GPU takes indices of the CPU
            raise RuntimeError(f"{name} is given {tuple(operand.shape)} of {operand.device} beside tensors of {DEVICE}")
    target = torch.device(kwargs.get("device") or DEVICE)
    kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
    known = {id(operand.held): operand for operand in tree_leaves((args, kwargs)) if isinstance(operand, Pretend)}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if target.type == "cpu" or name in _WAITING:
        waits.append(name)
    if target.type == "cpu":
        return out

    def wrapped(made: Any) -> Any:
        return made if not isinstance(made, Tensor) else known[id(made)] if id(made) in known else Pretend(made)

    return tree_map(wrapped, out)


def _held(operand: Any) -> Any:
    return operand.held if isinstance(operand, Pretend) else operand


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")
for _name, _made in (("empty.memory_format", _empty), ("empty_strided", _empty_strided), ("_copy_from", _copy_from)):
    _LIBRARY.impl(_name, _made, "PrivateUse1")
