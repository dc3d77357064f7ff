"""Tells which backend ran a call and why not the others, where NATTEN_LOG_LEVEL is "debug".

Adapters ask `_log.TELLS_CHOICES` and call `tell` after a call has been run or, in JAX, lowered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from natten import _core
from natten._args import options_of
from natten._log import logger
from natten._roles import roles_of

_told: set[str] = set()
_MOST_TOLD = 10_000  # then all is forgotten, so that a long run keeps its memory


def tell(
    op: str,
    config: Sequence[int],
    scale: float | None,
    backend: str,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    device: str,
) -> None:
    """Logs the choice, once for each problem. Tensors are arrays, (shape, dtype name) or None."""
    rows = _core.explain(op, config, scale, backend, inputs, device, outputs)
    message = f"{_problem(op, config, inputs, device)}: {_choice(rows, backend)}"
    if message in _told:
        return
    if len(_told) >= _MOST_TOLD:
        _told.clear()
    _told.add(message)
    logger.debug("%s", message)


def _problem(op: str, config: Sequence[int], inputs: Sequence[Any], device: str) -> str:
    tensors, dtype = [], ""
    for role, x in zip(roles_of(op)[0], inputs, strict=True):
        if x is None:
            continue
        shape, kind = x if isinstance(x, tuple) else (x.shape, x.dtype)
        dtype = dtype or str(kind).removeprefix("torch.")
        tensors.append(f"{role.name} {list(shape)}")
    options = [f"{name} {list(value)}" for name, value in options_of(config).items()]
    return f"{op} on {device}, {dtype}, {', '.join(tensors + options)}"


def _choice(rows: Sequence[tuple[str, str, bool]], backend: str) -> str:
    chosen = ", ".join(name for name, _, is_chosen in rows if is_chosen)
    others = [
        f"{name} does not run it: {refusal}" if refusal else f"{name} would run it too"
        for name, refusal, is_chosen in rows
        if not is_chosen
    ]
    forced = backend or os.environ.get("NATTEN_BACKEND")
    by = f' (asked for: "{forced}")' if forced else ""
    return "; ".join([f"{chosen} runs it{by}", *others])
