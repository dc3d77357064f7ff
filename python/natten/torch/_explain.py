"""`natten.explain` and `explain_call`: which backend would run a call, and why not the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Never, Unpack

import torch
from torch import Tensor

from natten import _core, context
from natten._args import (
    Bools,
    Boundaries,
    Config,
    Ints,
    UpstreamKeywords,
    by_name,
    check_extra,
    make_config,
    real_scale,
)
from natten._kernel import COMPOSED, check_name, chosen_backend, meaning
from natten.torch import _composed, _functional, _ops
from natten.torch._composed import lacks_kernels
from natten.torch._private import FakeTensorMode, TorchDispatchMode, tree_leaves, tree_map
from natten.torch._tuning import fused_flags


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one backend says about one pass of a call."""

    operation: str
    backend: str
    refusal: str  # why it cannot run the call; empty where it can
    chosen: bool  # whether it is the one that runs
    configuration: str = ""  # of the chosen one, where the tuner is on: how it cuts the problem
    origin: str = ""  # of the configuration: "default", "tuned" (by this process) or "cache"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backends for a call, best first; prints as a table."""

    verdicts: tuple[Verdict, ...]
    note: str = ""  # where the name of a backend that was given stands for another

    def __str__(self) -> str:
        rows = [("pass", "backend", "answer")]
        for v in self.verdicts:
            answer = "chosen" if v.chosen else "accepts" if not v.refusal else f"no: {v.refusal}"
            if v.origin:
                answer += f", {v.configuration} ({v.origin})"
            rows.append((v.operation, v.backend, answer))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([*lines, self.note] if self.note else lines)

    __repr__ = __str__


@by_name
def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *by_position: Never,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools | None = False,
    boundary: Boundaries = "shift",
    rpb: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    query_offset: Ints | None = None,
    key_offset: Ints | None = None,
    grid_size: Ints | None = None,
    backend: str | None = None,
    q_tile_shape: Ints | None = None,
    kv_tile_shape: Ints | None = None,
    backward_q_tile_shape: Ints | None = None,
    backward_kv_tile_shape: Ints | None = None,
    backward_kv_splits: Ints | None = None,
    **upstream: Unpack[UpstreamKeywords],
) -> Explanation:
    """Which backend would run `na1d`, `na2d` or `na3d` with these arguments, forward and backward.

    Runs nothing. The rank is that of `query`; an enclosing `na_kernel` and NATTEN_BACKEND count.
    The backward pass is one that wants all gradients.

        print(natten.explain(query, key, value, kernel_size=7))

    Returns:
        A table: text when printed, its rows in `verdicts`. Its `note` says what a name of NATTEN's
        backends stands for.

    Raises:
        ValueError, TypeError: as those functions do.
    """
    if by_position or upstream:
        check_extra("explain", by_position, upstream)
    inputs = [query, key, value, rpb, additional_keys, additional_values, key_mask]
    for role, x in zip(_ops.attention_forward.inputs, inputs, strict=True):
        if isinstance(x, Tensor) and x.is_nested:
            raise ValueError(f"{role.name}: got a nested tensor; explain one of its examples")
        if x is not None or role.is_required:
            _ops.check_tensor(role.name, x)
    note = meaning(backend)
    backend = chosen_backend(backend)
    if backend:
        check_name(backend, query.device.type)
    config = make_config(
        _ops.rank_of(query),
        kernel_size,
        dilation,
        is_causal,
        stride,
        boundary,
        query_offset=query_offset,
        key_offset=key_offset,
        grid_size=grid_size,
        q_tile_shape=q_tile_shape,
        kv_tile_shape=kv_tile_shape,
        backward_q_tile_shape=backward_q_tile_shape,
        backward_kv_tile_shape=backward_kv_tile_shape,
        backward_kv_splits=backward_kv_splits,
        flags=fused_flags(scale),
    )
    scale = real_scale(scale)
    # What libnatten refuses is refused before the shapes of outputs are made of it.
    specs = [_ops.spec_of(x) for x in inputs]
    _core.plan("attention_forward", config, scale, "", specs, [True, True], None)
    sizes = _ops.attention_forward.sizes(inputs, {}, config)
    output, logsumexp = (
        query.new_empty(_ops.shape_of(role, sizes), dtype=_ops.dtype_of(role, query.dtype))
        for role in _ops.attention_forward.outputs
    )
    if lacks_kernels(query.device) and backend in ("", "fused"):
        backend = COMPOSED
    calls: dict[str, tuple[_ops.Operator, list[Tensor | None], list[Tensor | None]]] = {
        "forward": (_ops.attention_forward, inputs, [output, logsumexp]),
        "backward": (
            _ops.attention_backward,
            [*inputs, logsumexp, output, None],
            [query, key, value, rpb, additional_keys, additional_values],
        ),
    }
    return Explanation(
        tuple(
            Verdict(name, *row)
            for name, (operator, tensors, outputs) in calls.items()
            for row in _rows(operator, config, scale, backend, tensors, outputs)
        ),
        note,
    )


def explain_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backends would run natten's operations in `function(*args, **kwargs)`, and in the
    derivative of what it returns.

    Nothing is computed: inside of `function` tensors have shapes and types, and no values.

        print(natten.explain_call(na2d_qk, query, key, kernel_size=7))
        print(natten.explain_call(module, x))

    Args:
        function: one of natten's, such as `na2d_qk` and `attention`, a module, or whatever calls
            some.
        args, kwargs: what it is called with. The backward pass is one that wants the gradients of
            all tensors among them and of a module's parameters.

    Returns:
        A table as that of `explain`. Passes are "forward" and "backward" of fused operations and
        the names of others, such as "qk", with "backward" before those of the backward pass. Of
        calls with the same answers there is one.

    Raises:
        ValueError: no operation of natten's for PyTorch is called, or nested tensors or DTensors
            are given.
        What `function` raises.
    """
    leaves = tree_leaves((args, kwargs))
    for x in leaves:
        if isinstance(x, Tensor) and (x.is_nested or _functional.is_distributed(x)):
            kind = "a nested tensor" if x.is_nested else "a DTensor"
            raise ValueError(f"function: called with {kind}; explain a call on a dense part of it")
    recorder = _Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad(), recorder:

        def as_input(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return mode.from_tensor(x.detach()).requires_grad_(x.is_floating_point())

        args, kwargs = tree_map(as_input, (args, kwargs))
        inputs = tree_leaves((args, kwargs))
        if isinstance(function, torch.nn.Module):  # whose own buffers a call may change
            named = (*function.named_parameters(), *function.named_buffers())
            state: dict[str, Tensor] = {name: mode.from_tensor(x) for name, x in named}
            inputs += state.values()
            # Weights of a module that stands in two places would be put back wrongly if tied.
            results = torch.func.functional_call(function, state, args, kwargs, tie_weights=False)
        else:
            results = function(*args, **kwargs)
        inputs, results = (
            [x for x in xs if isinstance(x, Tensor) and x.requires_grad]
            for xs in (inputs, tree_leaves(results))
        )
        recorder.is_backward = True
        if inputs and results:
            ones = [torch.ones_like(x) for x in results]
            torch.autograd.grad(results, inputs, ones, allow_unused=True)
    if not recorder.verdicts:
        raise ValueError("function: calls none of natten's operations for PyTorch")
    return Explanation(tuple(recorder.verdicts), recorder.note)


class _Recorder(TorchDispatchMode):
    """Notes, without repetition, what backends say of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.verdicts: dict[Verdict, None] = {}
        self.is_backward = False
        self.note = ""

    def __enter__(self) -> _Recorder:
        _composed.observed.by = self._note_composed
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _composed.observed.by = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _BY_OVERLOAD.get(func)
        if operator is None:
            return func(*args, **kwargs or {})
        inputs, extras, config, scale, backend = operator.split(args)
        if backend:
            check_name(backend, inputs[0].device.type)
        results = func(*args[:-1], "")  # one that refuses the call is told of, and not raised
        outputs: Sequence[Any] = [results] if isinstance(results, Tensor) else results
        if "wanted" in extras:
            given = iter(outputs)
            outputs = [next(given) if want else None for want in extras["wanted"]]
        self._add(operator, config, scale, backend, inputs, outputs)
        return results

    def _note_composed(
        self,
        operator: _ops.Operator,
        config: Config,
        scale: float | None,
        inputs: Sequence[Tensor | None],
    ) -> None:
        self.note = "the derivative of composed is made of PyTorch's own operations"
        self._add(operator, config, scale, COMPOSED, inputs, [])

    def _add(self, operator: _ops.Operator, *call: Any) -> None:
        name = operator.name.removeprefix("attention_")
        if self.is_backward and name != "backward":
            name = f"backward {name}"
        for row in _rows(operator, *call):
            self.verdicts[Verdict(name, *row)] = None


def _rows(
    operator: _ops.Operator,
    config: Config,
    scale: float | None,
    backend: str,
    tensors: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
) -> list[tuple[str, str, bool, str, str]]:
    """What libnatten's backends say, and `composed`, which takes every call but is never the first
    choice where there are others. `outputs`: tensors like those, of which all are wanted."""
    if tensors[0] is not None and tensors[0].device.type == "meta":
        raise ValueError(
            f"{operator.inputs[0].name}: is on meta, where nothing is computed; must be on the "
            "device that the call is for (a FakeTensorMode of PyTorch needs no memory there)"
        )
    is_composed = backend == COMPOSED
    rows = []
    tuned = ("", "")
    if tensors[0] is not None and not lacks_kernels(tensors[0].device):
        # Whatever stands in is not chosen either; "" would leave the choice to NATTEN_BACKEND.
        known = _core.backends(tensors[0].device.type)[-1] if is_composed else backend
        device = str(tensors[0].device)
        given, specs = ([_ops.spec_of(x) for x in xs] for xs in (tensors, outputs))
        rows = _core.explain(operator.name, config, scale, known, given, device)
        if context._switches.tuning and any(chosen for _, _, chosen in rows):
            threads = torch.get_num_threads()
            tuned = _core.tuned(operator.name, config, scale, known, given, device, specs, threads)
    of_core = [
        (name, refusal, is_chosen, *(tuned if is_chosen else ("", "")))
        for name, refusal, chosen in rows
        for is_chosen in (chosen and not is_composed,)
    ]
    return [*of_core, (COMPOSED, "", is_composed, "", "")]


_BY_OVERLOAD = {x.overload: x for x in vars(_ops).values() if isinstance(x, _ops.Operator)}
