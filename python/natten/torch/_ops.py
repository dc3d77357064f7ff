"""libnatten's operations as PyTorch operators `torch.ops.natten.*`.

Each operator has a kernel, shapes for fake tensors and a batching rule, all three made from
libnatten's own table of tensors. Derivatives are in `_autograd.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from natten import _core
from natten._args import NONDETERMINISTIC, Config, window_size
from natten._choices import tell
from natten._kernel import check_name
from natten._log import TELLS_CHOICES
from natten._roles import GRIDS, Role, fold_dims, roles_of
from natten.torch._private import (
    BelowAutograd,
    add_batch_dim,
    enter_vmap,
    is_batched_by_vmap,
    is_plain,
    leave_vmap,
    remove_batch_dim,
    takes_part_in_autograd,
)

library = torch.library.Library("natten", "DEF")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def readable(x: Tensor | None) -> Tensor | None:
    """`x` with an innermost stride of 1, which is all that the kernels ask of a layout. Of memory
    that is not aligned, which they do not read either, see `aligned`."""
    if x is None or x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def aligned(xs: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """`xs`, those copied that do not lie at a multiple of their elements' size, as views of files
    and of bytes may; None where all do."""
    lies = [x is None or x.data_ptr() % x.element_size() == 0 for x in xs]
    if all(lies):
        return None
    return [x if fits or x is None else x.clone() for fits, x in zip(lies, xs, strict=True)]


# Extras of an operator on examples of different lengths, which lie one after another.
PACKING = {
    "cumulative_seqlen_Q": "Tensor cumulative_seqlen_Q",
    "cumulative_seqlen_KV": "Tensor cumulative_seqlen_KV",
    "max_seqlen_Q": "SymInt? max_seqlen_Q",
    "max_seqlen_KV": "SymInt? max_seqlen_KV",
}


class _Places(threading.local):
    outputs: Sequence[Tensor] = ()


_places = _Places()


@contextlib.contextmanager
def outputs_at(places: Sequence[Tensor]) -> Iterator[None]:
    """Within, the outputs of an operator's kernel are written to where they shall be, if they are
    as these are. Of one call without a derivative, whose outputs differ in shape."""
    # Detached, as what kernels write is no part of any graph.
    before, _places.outputs = _places.outputs, [x.detach() for x in places]
    try:
        yield
    finally:
        _places.outputs = before


class Operator:
    """`torch.ops.natten.<name>(inputs..., extras..., config, scale (fused only), backend)`.

    `extras` are the arguments that say what the inputs do not: sizes of outputs, by the letter that
    stands for them in `Role.dims`; where there is "wanted", which outputs to compute; and PACKING.
    """

    differentiate: Callable[..., Any]  # the kernel at the key Autograd, from `_autograd.py`

    def __init__(
        self, name: str, returns: str, extras: dict[str, str] | None = None, prefix: str = ""
    ) -> None:
        """`name`: of libnatten's operation; with `prefix` that of the operator."""
        self.name = name
        self.inputs, self.outputs = roles_of(name)
        self.extras = extras or {}
        self.is_fused = name.startswith("attention")
        self._all_wanted: list[Any] = [True] * len(self.outputs)
        self._results_wanted: list[Any] = [None if r.is_statistic else True for r in self.outputs]
        arguments = [f"Tensor{'' if r.is_required else '?'} {r.name}" for r in self.inputs]
        arguments += self.extras.values()
        # Offsets in a compiled graph may differ from call to call, hence symbolic.
        arguments += ["SymInt[] config", "float? scale", "str backend"]
        if not self.is_fused:
            arguments.remove("float? scale")
        name = prefix + name
        library.define(f"{name}({', '.join(arguments)}) -> {returns}")
        self.schema_name = name
        self.overload = getattr(torch.ops.natten, name).default
        for key in ("CPU", "CUDA"):
            library.impl(name, self._run, key)
        torch.library.register_fake(self.overload, self._fake, lib=library)
        torch.library.register_vmap(self.overload, self._vmap, lib=library)
        library.impl(name, self._batch_gradients, "Batched")

    # Both skip PyTorch's dispatcher where it would only lead to what they call, as it takes as long
    # as a small problem does.

    def __call__(self, *args: Any, statistic: bool = True) -> Any:
        """`statistic`: whether the caller uses logsumexp, which may be None else."""
        inputs = args[: len(self.inputs)]
        if not is_plain(inputs):
            return self.overload(*args)
        if takes_part_in_autograd(inputs):
            return self.differentiate(*args, kernel=self._run)
        if self.extras:
            return self._run(*args)
        wanted = self._all_wanted if statistic else self._results_wanted
        scale = args[-2] if self.is_fused else None
        return self._returned(self._run_core(inputs, wanted, args[len(inputs)], scale, args[-1]))

    def gradients(
        self, tensors: Sequence[Tensor | None], inputs: Sequence[Tensor | None], *options: Any
    ) -> list[Tensor | None]:
        """Of an operator whose outputs are gradients of `tensors`: those, None where that is.
        `options`: what follows its inputs, but for "wanted", which `tensors` say."""
        is_packed = "max_seqlen_Q" in self.extras
        if is_packed or not is_plain(inputs) or takes_part_in_autograd(inputs):
            wanted = [x is not None for x in tensors]
            if "wanted" in self.extras:
                given = iter(self(*inputs, wanted, *options))
                return [next(given) if want else None for want in wanted]
            results = self(*inputs, *options)
            return [y if want else None for want, y in zip(wanted, results, strict=True)]
        *_, config, scale, backend = (
            options if self.is_fused else (*options[:-1], None, options[-1])
        )
        # What can be made here is, as it takes the binding longer to have it made.
        outputs = [
            None
            if x is None
            else torch.empty_like(x)
            if x.is_contiguous()
            else (tuple(x.shape), _DTYPE_NAMES[x.dtype])
            for x in tensors
        ]
        return self._run_core(inputs, outputs, config, scale, backend)

    def below_autograd(self, *args: Any) -> Any:
        if is_plain(args[: len(self.inputs)]):
            return self._run(*args)
        with BelowAutograd():
            return self.overload(*args)

    def split(self, args: Sequence[Any]) -> tuple[Sequence[Any], dict, Config, float | None, str]:
        """(inputs, extras by name, config, scale, backend)."""
        count = len(self.inputs)
        extras = dict(zip(self.extras, args[count:], strict=False)) if self.extras else {}
        if self.is_fused:
            return args[:count], extras, *args[-3:]
        return args[:count], extras, args[-2], None, args[-1]

    def sizes(
        self, inputs: Sequence[Tensor | None], extras: dict, config: Config
    ) -> dict[str, tuple]:
        """What each letter of `Role.dims` stands for in a call; numbers may be symbolic."""
        rank = config[0]
        sizes: dict[str, tuple] = {
            "N": (0,),
            "R": tuple(2 * k - 1 for k in config[1 : rank + 1]),
        }
        for role, x in zip(self.inputs, inputs, strict=True):
            if x is None:
                continue
            at = 0
            for dim in role.dims:
                count = rank if dim in GRIDS else 1
                sizes[dim] = tuple(x.shape[at : at + count])
                at += count
        for dim, value in extras.items():
            if len(dim) == 1:
                sizes[dim] = tuple(value) if dim in GRIDS else (value,)
        sizes["W"] = sizes["X"] = (window_size(config, sizes.get("K", ())) + sizes["N"][0],)
        return sizes

    def _run(self, *args: Any) -> Any:
        inputs, extras, config, scale, backend = self.split(args)
        if not extras:
            return self._returned(self._run_core(inputs, self._all_wanted, config, scale, backend))
        packing = _packing_of(extras)
        outputs: list[Any]
        if "wanted" in extras:
            outputs = [True if want else None for want in extras["wanted"]]
        elif packing:
            outputs = self._all_wanted
        else:
            sizes = self.sizes(inputs, extras, config)
            dtype = _DTYPE_NAMES[inputs[0].dtype]
            outputs = [(shape_of(role, sizes), dtype) for role in self.outputs]
        return self._returned(self._run_core(inputs, outputs, config, scale, backend, packing))

    def _run_core(
        self,
        inputs: Sequence[Any],
        outputs: list[Any],
        config: Config,
        scale: float | None,
        backend: str,
        packing: tuple | None = None,
    ) -> list[Tensor | None]:
        """All outputs, None for those that `outputs` says None for."""
        inputs = [x if x is None or x.is_contiguous() else readable(x) for x in inputs]
        first = inputs[0]
        if config[-1] & NONDETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            config = (*config[:-1], config[-1] & ~NONDETERMINISTIC)

        def allocate(shape: tuple[int, ...], name: str) -> Tensor:
            dtype = _DTYPES[name]
            for x in _places.outputs:
                if x.shape == shape and x.dtype == dtype and x.device == first.device:
                    return x
            if shape == first.shape and dtype is first.dtype and first.is_contiguous():
                return torch.empty_like(first)  # takes half as long
            return first.new_empty(shape, dtype=dtype)

        options = (
            outputs,
            torch.get_num_threads(),
            allocate,
            stream_of(first) if first.is_cuda else None,
            packing,
        )
        try:
            results = _core.run(self.name, config, scale, backend, inputs, *options)
        except ValueError:
            copies = aligned(inputs)  # only now, as other calls need no such look
            if copies is None:
                raise
            results = _core.run(self.name, config, scale, backend, copies, *options)
        if TELLS_CHOICES:
            tell(self.name, config, scale, backend, inputs, results, str(first.device))
        return results

    def check_devices(self, inputs: Sequence[Tensor | None]) -> None:
        """Raises unless all inputs are on one device."""
        first = inputs[0]
        assert first is not None  # of every operator
        for role, x in zip(self.inputs, inputs, strict=True):
            if x is not None and x.device != first.device:
                raise ValueError(
                    f"{role.name}: is on {x.device}; must be on the device of "
                    f"{self.inputs[0].name}, {first.device}"
                )

    def _returned(self, results: list[Tensor | None]) -> Any:
        """`results` in the form that the schema has: absent outputs are left out of lists."""
        if "wanted" in self.extras:
            return [x for x in results if x is not None]
        return tuple(results) if len(results) > 1 else results[0]

    def _fake(self, *args: Any) -> Any:
        inputs, extras, config, scale, backend = self.split(args)
        wanted = extras.get("wanted", [True] * len(self.outputs))
        sizes = self.sizes(inputs, extras, config)
        shapes = [shape_of(role, sizes) for role in self.outputs]
        first = inputs[0]
        self.check_devices(inputs)
        numbers = itertools.chain(config, *(x.shape for x in inputs if x is not None))
        if backend:  # libnatten does not know `composed` among the names
            check_name(backend, first.device.type)
        if not any(type(n) is torch.SymInt for n in numbers):
            _core.plan(  # raises libnatten's own errors while a graph is traced
                self.name,
                config,
                scale,
                backend,
                [spec_of(x) for x in inputs],
                [
                    None if not want or role.is_statistic else (shape, dtype_name(first))
                    for role, shape, want in zip(self.outputs, shapes, wanted, strict=True)
                ],
                "cuda" if first.is_cuda else "cpu",  # without a number: it may not exist here
            )
        return self._returned(
            [
                first.new_empty(shape, dtype=dtype_of(role, first.dtype)) if want else None
                for role, shape, want in zip(self.outputs, shapes, wanted, strict=True)
            ]
        )

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """torch.func.vmap."""
        if info.batch_size > 0:
            return self._batch(info.batch_size, in_dims, args)
        # An example of zeros stands in, and is taken out of the results.
        count = len(self.inputs)
        examples = [
            x if dim is None else torch.cat([x, x.sum(dim, keepdim=True, dtype=x.dtype)], dim)
            for x, dim in zip(args[:count], in_dims, strict=False)
        ]
        results, axes = self._batch(1, in_dims, (*examples, *args[count:]))
        if isinstance(axes, int):
            return _emptied(results, axes), axes
        return type(results)(map(_emptied, results, axes)), axes

    def _batch_gradients(self, *args: Any) -> Any:
        """torch.autograd.grad(..., is_grads_batched=True), whose vmap is not that of torch.func."""
        level = enter_vmap() - 1
        leave_vmap()
        # The mapped axis first, and one of size 1 where there is none.
        found = {
            i: remove_batch_dim(x, level, 1, 0)
            for i, x in enumerate(args[: len(self.inputs)])
            if x is not None and is_batched_by_vmap(x)
        }
        size = next((x.shape[0] for x in found.values() if x.shape[0] != 1), 1)
        mapped = {i: x for i, x in found.items() if x.shape[0] == size}
        results, axes = self._batch(
            size,
            [0 if i in mapped else None for i in range(len(args))],
            [mapped.get(i, x) for i, x in enumerate(args)],
        )
        if isinstance(axes, int):
            return add_batch_dim(results, axes, level)
        return type(results)(
            add_batch_dim(x, axis, level) for x, axis in zip(results, axes, strict=True)
        )

    def _batch(
        self, size: int, in_dims: Sequence[int | None], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        """(results of `size` examples, their mapped axes), by one call that has the mapped axis
        folded into the batch or the heads (`fold_dims`)."""
        inputs, extras, config, *_ = self.split(args)
        rank = config[0]
        wanted = extras.get("wanted", [True] * len(self.outputs))
        roles = [role for role, want in zip(self.outputs, wanted, strict=True) if want]
        if any(
            isinstance(x, Tensor) and dim is not None
            for x, dim in zip(args[len(inputs) :], in_dims[len(inputs) :], strict=False)
        ):  # lengths
            return self._batch_one_by_one(size, in_dims, args)
        mapped_roles = [r for r, d in zip(self.inputs, in_dims, strict=False) if d is not None]
        dims = fold_dims(mapped_roles, roles)
        if dims != "B" and any(role.is_mask for role in mapped_roles):
            return self._batch_one_by_one(size, in_dims, args)
        batch: Any = extras.get("B")  # of an example
        folded: list[Tensor | None] = []
        for role, x, mapped in zip(self.inputs, inputs, in_dims, strict=False):
            axis = 0 if role.is_mask and dims == "B" else role.axis_of(dims, rank)
            # Absent, or what all examples share: a bias, or a mask.
            if x is None or axis is None or (role.is_mask and mapped is None and x.shape[0] == 1):
                folded.append(x)
                continue
            if mapped is None:
                x = x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
            else:
                x = x.movedim(mapped, axis)
            if role.is_mask and x.shape[1] == 1:
                x = x.expand(size, batch, *x.shape[2:])
            elif dims == "B" and not role.is_mask:
                batch = x.shape[1]
            folded.append(x.flatten(axis, axis + 1))
        options = [
            size * batch if dims == "B" and letter == "B" else value
            for letter, value in extras.items()
        ]
        results = self.overload(*folded, *options, *args[len(folded) + len(extras) :])
        many = isinstance(results, (tuple, list))
        axes = [role.axis_of(dims, rank) for role in roles]
        unfolded = [
            x.unflatten(axis, (size, x.shape[axis] // size))
            for x, axis in zip(results if many else [results], axes, strict=True)
        ]
        if many:
            return type(results)(unfolded), type(results)(axes)
        return unfolded[0], axes[0]

    def _batch_one_by_one(
        self, size: int, in_dims: Sequence[int | None], args: Sequence[Any]
    ) -> tuple[Any, Any]:
        """`_batch` by a call for each example: where they have both masks and biases, or gradients
        of biases, or lengths, of their own, no dimension can take the mapped axis."""
        each = []
        for i in range(size):
            example = [
                x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x
                for x, dim in zip(args, in_dims, strict=False)
            ]
            each.append(self.overload(*example))
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        kind = type(each[0])
        return kind(map(torch.stack, zip(*each, strict=True))), kind([0] * len(each[0]))


def _packing_of(extras: dict[str, Any]) -> tuple | None:
    """Those of an operator on many examples, as libnatten takes them."""
    if "cumulative_seqlen_Q" not in extras:
        return None
    packing = [extras[name] for name in PACKING]
    return *(x.tolist() for x in packing[:2]), *packing[2:]


def stream_of(x: Tensor) -> int:
    """The stream that PyTorch has current for a CUDA tensor's device."""
    return torch.cuda.current_stream(x.device).cuda_stream


def check_tensor(name: str, x: Any, may_be_nested: bool = False) -> None:
    """Raises unless `x` is a tensor of a kind that libnatten reads."""
    if not isinstance(x, Tensor):
        got = "None" if x is None else type(x).__name__
        other = type(x).__module__.partition(".")[0].removesuffix("lib")  # jaxlib has the arrays
        advice = f" (natten.{other} has functions for others)" if other in ("numpy", "jax") else ""
        if isinstance(x, torch.fx.Proxy):
            advice = " (torch.fx must not trace into natten: see Tracer.is_leaf_module, fx.wrap)"
        raise TypeError(f"{name}: got {got}; must be a torch.Tensor{advice}")
    if x.is_nested and not may_be_nested:
        raise ValueError(f"{name}: got a nested tensor; must be dense, as the others are")
    if x.is_quantized or x.layout not in (torch.strided, torch.jagged):
        kind = x.dtype if x.is_quantized else x.layout
        raise TypeError(f"{name}: got a {kind} tensor; must be dense (torch.strided), unquantized")


def rank_of(query: Tensor) -> int:
    """The number of spatial axes of a query of fused attention."""
    check_tensor("query", query, may_be_nested=True)
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(
            f"query: got shape {list(query.shape)}; must be [batch, *spatial, heads, head_dim] "
            "with one to three spatial axes"
        )
    return rank


def _emptied(x: Tensor, axis: int) -> Tensor:
    return x.narrow(axis, 0, 0)


def name_of(dtype: torch.dtype) -> str:
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_name(x: Tensor) -> str:
    return name_of(x.dtype)


def spec_of(x: Tensor | None) -> tuple[tuple[int, ...], str] | None:
    """What the binding takes in the place of a tensor that nothing is read of."""
    return None if x is None else (tuple(x.shape), dtype_name(x))


def dtype_of(role: Role, dtype: torch.dtype) -> torch.dtype:
    """The type of one tensor of an operation on tensors of a type."""
    return torch.float32 if role.is_statistic and dtype != torch.float64 else dtype


def shape_of(role: Role, sizes: dict[str, tuple]) -> tuple:
    return tuple(n for dim in role.dims for n in sizes[dim])


attention_forward = Operator("attention_forward", "(Tensor output, Tensor logsumexp)")
attention_backward = Operator("attention_backward", "Tensor[]", {"wanted": "bool[] wanted"})
packed_attention_forward = Operator(
    "attention_forward", "(Tensor output, Tensor logsumexp)", PACKING, "packed_"
)
packed_attention_backward = Operator(
    "attention_backward", "Tensor[]", {"wanted": "bool[] wanted", **PACKING}, "packed_"
)
qk = Operator("qk", "Tensor")
av = Operator("av", "Tensor")
av_transpose = Operator(
    "av_transpose", "(Tensor, Tensor)", {"K": "SymInt[] key_grid", "N": "SymInt additional"}
)
rpb_gather = Operator(
    "rpb_gather",
    "Tensor",
    {"B": "SymInt batch", "Q": "SymInt[] grid", "N": "SymInt additional"},
)
rpb_scatter = Operator("rpb_scatter", "Tensor")
