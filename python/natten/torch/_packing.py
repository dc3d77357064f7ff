"""Examples of different lengths that lie one after another in tensors of batch 1: where each is.

What lengths must be is checked where they are read, which is in libnatten: they may lie on a GPU,
and while a graph is traced they are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natten import _core
from natten._args import (
    ALLOW_NO_KEYS,
    SEPARATE_KEY_GRID,
    Config,
    check_both,
    check_lengths,
    integer,
    make_config,
)
from natten.torch import _ops
from natten.torch._private import FakeTensor, break_graph

# cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV
Packing = tuple[Tensor, Tensor, int | None, int | None]


def given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None,
    seqlens_KV: Tensor | None,
    cumulative_seqlen_Q: Tensor | None,
    cumulative_seqlen_KV: Tensor | None,
    max_seqlen_Q: int | None,
    max_seqlen_KV: int | None,
) -> Packing | tuple[()]:
    """What the arguments of `attention` say; () where they say that there is one length."""
    lengths = {
        "seqlens_Q": seqlens_Q,
        "seqlens_KV": seqlens_KV,
        "cumulative_seqlen_Q": cumulative_seqlen_Q,
        "cumulative_seqlen_KV": cumulative_seqlen_KV,
    }
    said = check_lengths(lengths, max_seqlen_Q, max_seqlen_KV)
    if said is None:
        return ()
    names, most = said
    first, second = _checked(query, key, value, {name: lengths[name] for name in names})
    if names[0] == "seqlens_Q":
        return _ends_of(first), _ends_of(second), None, None
    longest = [None if x is None else _number(name, x) for name, x in most.items()]
    return first, second, longest[0], longest[1]


def _number(name: str, value: Any) -> int:
    # Dynamo cannot follow questions about types.
    return value if torch.compiler.is_compiling() else integer(name, value, 1)


def _ends_of(lengths: Any) -> Tensor:
    """0, and the sums of lengths up to each example."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])


def _checked(
    query: Tensor, key: Tensor, value: Tensor, lengths: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The two tensors of `lengths`."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        _ops.check_tensor(name, x)
        if x.dim() != 4 or x.shape[0] != 1:
            raise ValueError(
                f"{name}: got shape {list(x.shape)}; with lengths of examples it must be "
                "[1, sum of lengths, heads, dim]"
            )
    (first, _), (second, _) = lengths.items()
    for name, x in lengths.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}; must be a torch.Tensor")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: got dtype {x.dtype}; must be torch.int32 or torch.int64")
        if x.dim() != 1 or x.shape[0] == 0:
            must = "[examples]" if first == "seqlens_Q" else "[examples + 1]"
            raise ValueError(
                f"{name}: got shape {list(x.shape)}; must be {must}, with one example or more"
            )
        if x.device != query.device:
            raise ValueError(
                f"{name}: is on {x.device}; must be on the device of query, {query.device}"
            )
    if lengths[first].shape != lengths[second].shape:
        raise ValueError(
            f"{second}: got {lengths[second].shape[0]} numbers; must be "
            f"{lengths[first].shape[0]}, as many as in {first}"
        )
    return lengths[first], lengths[second]


def check(args: Sequence[Any]) -> None:
    """Raises, as libnatten does where it reads them, unless lengths among the arguments of
    `packed_attention_forward` fit its tensors; and where they cannot be read."""
    unknown = (  # not a global, of which Dynamo would show no value
        "attention: got lengths of examples that are not known while a graph is traced, or on the "
        "device meta; composed reads them, so it must be called outside of the graph "
        "(torch.compiler.disable), or with another backend"
    )
    if torch.compiler.is_dynamo_compiling():
        break_graph(unknown)
    inputs, extras, config, _, _ = _ops.packed_attention_forward.split(args)
    queries, keys, longest_query, longest_key = extras.values()
    if queries.is_meta or isinstance(queries, FakeTensor):
        raise RuntimeError(unknown)
    specs = [_ops.spec_of(x) for x in inputs]
    _check(specs, config, (queries, keys, longest_query, longest_key))


def _check(specs: list[Any], config: Config, packing: Packing) -> None:
    queries, keys, longest_query, longest_key = packing
    _core.plan(
        "attention_forward", config, None, "", specs, [True, None], None,
        (queries.tolist(), keys.tolist(), longest_query, longest_key),
    )  # fmt: skip


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What `attention` takes in place of lengths: cumulative and largest ones.

    It waits for a device that lengths are on, and breaks a graph that is traced, so it is best
    called once for all layers of a model, outside of `torch.compile`.

    Args:
        query, key, value: [1, sum of lengths, heads, dim], as `attention` takes them.
        seqlens_Q, seqlens_KV: the length of each example, int32 or int64 [examples] on the device
            of query; None for both where there is one length.

    Returns:
        (cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV): two tensors
        [examples + 1] of the dtype of the lengths, and two integers. Without lengths (None, None,
        0, 0), which `attention` takes for one length.

    Raises:
        ValueError: lengths that do not fit the tensors; one without the other.
        TypeError: an argument of another type.
        RuntimeError: in a function that is compiled.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generate_varlen_parameters: called in a function that is compiled; must be called "
            "before, and its results passed on"
        )
    if seqlens_Q is None and seqlens_KV is None:
        return None, None, 0, 0
    lengths = {"seqlens_Q": seqlens_Q, "seqlens_KV": seqlens_KV}
    check_both(lengths, ("seqlens_Q", "seqlens_KV"))
    queries, keys = _checked(query, key, value, lengths)
    ends = _ends_of(queries), _ends_of(keys)
    inputs = [_ops.spec_of(x) for x in (query, key, value)]
    config = make_config(1, 1, flags=SEPARATE_KEY_GRID | ALLOW_NO_KEYS)
    _check([*inputs, *[None] * 4], config, (*ends, None, None))
    return *ends, int(queries.max()), int(keys.max())
