"""Everything of PyTorch that is used here and that PyTorch does not promise to keep.

A version of PyTorch that lacks a name, or has changed what it does, is dealt with in this file
alone. tests/test_private_names.py says which names are gone, and that no other file uses such.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from torch import Tensor, is_grad_enabled
from torch import _add_batch_dim as add_batch_dim
from torch import _nested_view_from_buffer as nested_view_from_buffer
from torch import _remove_batch_dim as remove_batch_dim
from torch._C import DispatchKey, DispatchKeySet
from torch._C import _any_requires_grad as any_requires_grad
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _dispatch_keys as dispatch_keys
from torch._C import _dispatch_tls_local_include_set as dispatch_keys_of_thread
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _vmapmode_decrement_nesting as leave_vmap
from torch._C import _vmapmode_increment_nesting as enter_vmap
from torch._C._autograd import _pop_saved_tensors_default_hooks as pop_hooks
from torch._C._autograd import _profiler_enabled as is_profiler_enabled
from torch._C._autograd import _push_saved_tensors_default_hooks as push_hooks
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._C._functorch import is_legacy_batchedtensor as is_batched_by_vmap
from torch._functorch.utils import enable_single_level_autograd_function as allow_rules
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.func import vjp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as active_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

C = TypeVar("C", bound=Callable[..., Any])


def _raw_key_sets(*keys: DispatchKey) -> set[int]:
    """A set of dispatch keys, and what inference mode leaves of it."""
    left = [key for key in keys if not key.name.startswith("Autograd")]
    return {
        functools.reduce(operator.or_, map(DispatchKeySet, members)).raw_repr()
        for members in ([*keys, DispatchKey.ADInplaceOrView], left)
    }


_PLAIN_TENSORS = {
    raw
    for device in ("CPU", "CUDA")
    for raw in _raw_key_sets(
        *(getattr(DispatchKey, prefix + device) for prefix in ("", "Autograd", "Autocast"))
    )
}
_PLAIN_THREADS = _raw_key_sets(DispatchKey.BackendSelect)


def is_plain(tensors: Iterable[Any]) -> bool:
    """Whether PyTorch's dispatcher would do nothing with these tensors (or None) but autograd and
    the call of a kernel: no mode, transform or tracer is active, none is nested, sparse, negated,
    on another device, or of a class that sees its calls, and no profiler wants to see this one."""
    if dispatch_keys_of_thread().raw_repr() not in _PLAIN_THREADS or is_profiler_enabled():
        return False
    for x in tensors:
        if x is not None and not (
            isinstance(x, Tensor) and dispatch_keys(x).raw_repr() in _PLAIN_TENSORS
        ):
            return False
    return True


def is_in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def takes_part_in_autograd(tensors: Iterable[Any]) -> bool:
    """Whether results of plain tensors may have derivatives, in either mode."""
    return is_in_forward_mode() or (is_grad_enabled() and any_requires_grad(*tensors))


def forward_mode_levels() -> int:
    """How many transforms are active that differentiate in forward mode."""
    return sum(x.key() == TransformType.Jvp for x in get_interpreter_stack() or [])


class _Dynamo(importlib.abc.MetaPathFinder):
    """Finds it as Python does, and has what waits called once it is loaded."""

    name = "torch._dynamo"

    def __init__(self) -> None:
        self.waiting: list[Callable[[], Any]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                while self.waiting:
                    self.waiting.pop()()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec


_dynamo = _Dynamo()


def with_dynamo(then: Callable[[], Any]) -> None:
    """Calls `then` now or when Dynamo is loaded, which takes a second: only who compiles waits."""
    if _dynamo.name in sys.modules:
        then()
        return
    if not _dynamo.waiting:
        sys.meta_path.insert(0, _dynamo)
    _dynamo.waiting.append(then)


def break_graph(why: str) -> None:
    """Has Dynamo, which traces this, run the caller outside of the graph; an error with `why` where
    there must be one graph."""
    import torch._dynamo

    torch._dynamo.graph_break(why)


def pulled_back(function: Callable[..., Any], tensors: Iterable[Tensor], grads: Any) -> Any:
    """The gradients of a function's inputs from those of its outputs. Unlike `torch.func.vjp` also
    where hooks wait for tensors that are saved, such as those of `save_on_cpu`, which do not get
    those that are saved in here."""
    hooks = []
    while (hook := top_hooks(True)) is not None:
        hooks.append(hook)
        pop_hooks()
    try:
        return vjp(function, *tensors)[1](grads)
    finally:
        for hook in reversed(hooks):
            push_hooks(*hook)


def refuses_script(callee: C) -> C:
    """Has `torch.jit.script` of a function, of a module's class, or of what calls them, say what to
    do instead. Its own words would be of signatures and annotations."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"{callee.__name__}: torch.jit.script takes no functions and modules of natten; use "
            "torch.compile, torch.export or torch.jit.trace"
        )

    callee.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]  # which it calls
    return callee


def tell_active_flop_counters() -> None:
    """Has them know the formulas that were registered after they were made."""
    for mode in active_modes():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry = {**flop_registry, **counter.flop_registry}


__all__ = [
    "BelowAutograd",
    "FakeTensor",
    "FakeTensorMode",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "add_batch_dim",
    "allow_rules",
    "any_requires_grad",
    "are_transforms_active",
    "break_graph",
    "enter_vmap",
    "forward_mode_levels",
    "is_any_autocast_enabled",
    "is_batched_by_vmap",
    "is_in_forward_mode",
    "is_plain",
    "leave_vmap",
    "nested_view_from_buffer",
    "pulled_back",
    "refuses_script",
    "remove_batch_dim",
    "set_forward_mode",
    "takes_part_in_autograd",
    "tell_active_flop_counters",
    "tree_leaves",
    "tree_map",
    "with_dynamo",
]
