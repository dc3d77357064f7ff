"""`natten.explain`: which backend would run a call, and why not the others."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from natten import _core
from natten._args import Bools, Ints, attention_flags, make_config, real_scale
from natten._kernel import check_name, chosen_backend
from natten.torch import _ops


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one backend says about one pass of a call."""

    operation: str
    backend: str
    refusal: str  # why it cannot run the call; empty where it can
    chosen: bool  # whether it is the one that runs


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The backends for a call, best first; prints as a table."""

    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        rows = [("pass", "backend", "answer")]
        for v in self.verdicts:
            answer = "chosen" if v.chosen else "accepts" if not v.refusal else f"no: {v.refusal}"
            rows.append((v.operation, v.backend, answer))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)

    __repr__ = __str__


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    is_causal: Bools = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    stride: Ints = 1,
    backend: str | None = None,
    **tile_shapes: Ints | None,
) -> Explanation:
    """Which backend would run `na1d`, `na2d` or `na3d` with these arguments, forward and backward.

    Runs nothing. The rank is that of `query`; an enclosing `na_kernel` and NATTEN_BACKEND count.

        print(natten.explain(query, key, value, kernel_size=7))

    Returns:
        A table: text when printed, its rows in `verdicts`.

    Raises:
        ValueError, TypeError: as those functions do.
    """
    if query.is_nested:
        raise ValueError("query: got a nested tensor; explain one of its examples")
    if backend:
        check_name(backend)
    rank = query.dim() - 3
    flags = attention_flags(scale)
    config = make_config(rank, kernel_size, dilation, is_causal, stride, flags=flags, **tile_shapes)
    inputs = [query, key, value, rpb, additional_keys, additional_values]
    sizes = _ops.attention_forward.sizes(inputs, {}, config)
    output, logsumexp = (
        query.new_empty(_ops.shape_of(role, sizes), dtype=_ops.dtype_of(role, query.dtype))
        for role in _ops.attention_forward.outputs
    )
    calls = {
        "forward": (_ops.attention_forward, inputs),
        "backward": (_ops.attention_backward, [*inputs, logsumexp, output, None]),
    }
    return Explanation(
        tuple(
            Verdict(name, *row)
            for name, (operator, tensors) in calls.items()
            for row in _core.explain(
                operator.name, config, real_scale(scale), chosen_backend(backend), tensors
            )
        )
    )
