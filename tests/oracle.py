"""The judge of everything: neighborhood attention as dense attention with a mask, in float64.

Written from the definition and sharing no code with the library: which keys a query sees is found
by listing the tokens of its dilation group; gradients are those of masked softmax attention.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cases import Arrays, Case


def axis_slots(
    length: int, k: int, s: int, d: int, causal: bool, boundary: str = "shift"
) -> list[list[tuple[int, int, int]]]:
    """For each token of an axis, (slot, token, distance) of each that it attends to, in slot order;
    the distance counts positions, beyond the seam too. Slots that hold nothing are left out."""
    windows = []
    for i in range(length):
        group = [t for t in range(length) if t % d == i % d]
        n, p = len(group), group.index(i)
        if causal:
            leader = min((p // s) * s + s - 1, n - 1)
            positions = range(max(leader - k + 1, 0), p + 1)
        elif boundary == "circular":
            leader = (p // s) * s + s // 2
            positions = range(leader - k // 2, leader - k // 2 + k)
        else:
            leader = min((p // s) * s + s // 2, n - 1)
            first = leader - k // 2
            if boundary == "shift":
                while first < 0:
                    first += 1
                while first + k > n:
                    first -= 1
            positions = range(first, first + k)
        windows.append(
            [
                (j, group[position % n], position - p)
                for j, position in enumerate(positions)
                if boundary == "circular" or 0 <= position < n
            ]
        )
    return windows


def axis_windows(
    length: int, k: int, s: int, d: int, causal: bool, boundary: str = "shift"
) -> list[list[int]]:
    """For each token of an axis, the tokens it attends to, in slot order."""
    slots = axis_slots(length, k, s, d, causal, boundary)
    return [[token for _, token, _ in window] for window in slots]


def axis_key_range(
    offset: int,
    count: int,
    length: int,
    k: int,
    s: int,
    d: int,
    causal: bool,
    boundary: str = "shift",
) -> tuple[int, int]:
    """The first of the tokens that queries `offset` to `offset + count - 1` of an axis attend to,
    and the one past the last. On a circular axis tokens count on from the queries."""
    slots = axis_slots(length, k, s, d, causal, boundary)
    queries = range(offset, offset + count)
    tokens = [query + distance * d for query in queries for _, _, distance in slots[query]]
    begin, end = min(tokens), max(tokens) + 1
    return (begin, end) if end - begin <= length else (0, length)


def key_indices(offset: int, count: int, length: int, boundary: str = "shift") -> dict[int, int]:
    """Of each token of an axis that is among `count` keys from `offset` on, its number there."""
    indices = {}
    for i in range(count):
        token = (offset + i) % length if boundary == "circular" else offset + i
        if 0 <= token < length:
            indices[token] = i
    return indices


class Grid:
    """Which query sees which key, in which slot and at which relative position: dense matrices over
    all pairs of what is given of either, row-major. -1 where the key is not seen. Of a problem it
    reads what `Case` says of the neighborhood; what is not there is the default."""

    def __init__(self, case: Any) -> None:
        def of_axes(name: str, default: Any) -> Any:
            value = getattr(case, name, None)
            return (default,) * len(case.shape) if value is None else value

        key_shape = getattr(case, "key_shape", None) or case.shape
        self.slot = self.relative = np.zeros((1, 1), int)
        for queries, keys, length, first_query, first_key, k, s, d, causal, boundary in zip(
            case.shape,
            key_shape,
            getattr(case, "grid_size", None) or key_shape,
            of_axes("query_offset", 0),
            of_axes("key_offset", 0),
            case.kernel_size,
            case.stride,
            case.dilation,
            case.is_causal,
            of_axes("boundary", "shift"),
            strict=True,
        ):
            slot, relative = np.full((2, queries, keys), -1)
            slots = axis_slots(length, k, s, d, causal, boundary)
            indices = key_indices(first_key, keys, length, boundary)
            for query in range(queries):
                for j, token, distance in slots[first_query + query]:
                    slot[query, indices[token]] = j
                    relative[query, indices[token]] = distance + k - 1
            self.slot = _product(self.slot, slot, k)
            self.relative = _product(self.relative, relative, 2 * k - 1)
        self.seen = self.slot >= 0


def _product(outer: np.ndarray, inner: np.ndarray, base: int) -> np.ndarray:
    """Index matrices of two axes as one, in row-major order."""
    a, b = outer[:, None, :, None], inner[None, :, None, :]
    pairs = np.where((a < 0) | (b < 0), -1, a * base + b)
    return pairs.reshape(len(outer) * len(inner), -1)


def _seen(grid: Grid, arrays: Arrays) -> np.ndarray:
    """[batch or 1, 1, queries, keys]: the grid's, less what the mask hides."""
    seen = grid.seen[None, None]
    mask = arrays.get("key_mask")
    return seen if mask is None else seen & mask.reshape(len(mask), 1, 1, seen.shape[-1])


def _clear_hidden(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Keys or values [B, H, keys, dim] with 0 for those that no query sees, which may be NaN."""
    return np.where(seen.any(-2)[..., None], x, 0.0)


def _flat_grid(x: np.ndarray, rank: int, first: int) -> np.ndarray:
    last = first + rank
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:])


def fused(case: Case, arrays: Arrays) -> Arrays:
    """Results and gradients of the fused operation, float64, in the layouts of its arguments."""
    grid = Grid(case)
    rank, group = case.rank, case.heads // case.kv_heads
    scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def heads_first(name: str) -> np.ndarray:  # [B, *spatial or N, H, ...] -> [B, H, tokens, ...]
        flat = _flat_grid(arrays[name], 1 if "additional" in name else rank, 1)
        return np.moveaxis(flat, 2, 1)

    seen = _seen(grid, arrays)
    tokens = seen.shape[-1]

    def with_additional(name: str, additional: str) -> np.ndarray:
        parts = [_clear_hidden(heads_first(name), seen)]
        parts += [heads_first(additional)] if case.additional else []
        return np.concatenate(parts, axis=2).repeat(group, axis=1)

    q, g, g_lse = (heads_first(n) for n in ("query", "grad_output", "grad_logsumexp"))
    k = with_additional("key", "additional_keys")
    v = with_additional("value", "additional_values")
    scores = scale * q @ k.swapaxes(-1, -2)
    if case.rpb:
        bias = arrays["rpb"].reshape(case.heads, -1)[:, grid.relative]
        scores[..., :tokens] += np.where(grid.seen, bias, 0)
    scores[..., :tokens] = np.where(seen, scores[..., :tokens], -np.inf)
    largest = scores.max(-1, keepdims=True)
    is_empty = np.isneginf(largest)
    weights = np.exp(scores - np.where(is_empty, 0, largest))
    total = weights.sum(-1, keepdims=True)
    weights /= np.where(is_empty, 1, total)
    logsumexp = np.where(is_empty, -np.inf, largest + np.log(np.where(is_empty, 1, total)))
    grad_weights = g @ v.swapaxes(-1, -2)
    row = (weights * grad_weights).sum(-1, keepdims=True) - g_lse[..., None]
    grad_scores = weights * (grad_weights - row)

    def ungroup(x: np.ndarray) -> np.ndarray:  # sums over the heads that share a key-value head
        b, _, n, dim = x.shape
        return x.reshape(b, case.kv_heads, group, n, dim).sum(2)

    grad_k = ungroup(scale * grad_scores.swapaxes(-1, -2) @ q)
    grad_v = ungroup(weights.swapaxes(-1, -2) @ g)

    def heads_last(x: np.ndarray, shape: tuple[int, ...] = case.shape) -> np.ndarray:
        x = np.moveaxis(x, 1, 2)
        return x.reshape(x.shape[0], *shape, *x.shape[2:])

    results = {
        "output": heads_last(weights @ v),
        "logsumexp": heads_last(logsumexp)[..., 0],
        "grad_query": heads_last(scale * grad_scores @ k),
        "grad_key": heads_last(grad_k[:, :, :tokens], case.keys_shape),
        "grad_value": heads_last(grad_v[:, :, :tokens], case.keys_shape),
    }
    if case.additional:
        results["grad_additional_keys"] = np.moveaxis(grad_k[:, :, tokens:], 1, 2)
        results["grad_additional_values"] = np.moveaxis(grad_v[:, :, tokens:], 1, 2)
    if case.rpb:
        results["grad_rpb"] = _scatter_rpb(case, grid, grad_scores[..., :tokens])
    return results


def _scatter_rpb(case: Case, grid: Grid, pairs: np.ndarray) -> np.ndarray:
    """Sums a [B, H, queries, keys] matrix over batch and pairs at the same relative position. It
    holds 0 where a mask hides the key."""
    shape = tuple(2 * k - 1 for k in case.kernel_size)
    result = np.zeros((case.heads, math.prod(shape)))
    for head in range(case.heads):
        total = pairs[:, head].sum(0)
        np.add.at(result[head], grid.relative[grid.seen], total[grid.seen])
    return result.reshape(case.heads, *shape)


def unfused(case: Case, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(results and gradients of qk, of av), float64, in the layouts of their arguments."""
    grid = Grid(case)
    seen = _seen(grid, arrays)
    tokens, window = seen.shape[-1], case.slots - case.additional
    x = {n: a if "add" in n or n in ("rpb", "key_mask") else _flat_grid(a, case.rank, 2)
         for n, a in arrays.items()}  # fmt: skip
    rows, columns = np.nonzero(grid.seen)
    slots = grid.slot[rows, columns]

    def dense(weights: np.ndarray) -> np.ndarray:  # [..., slots] -> [..., keys + additional]
        out = np.zeros((*weights.shape[:-1], tokens + case.additional))
        out[..., rows, columns] = weights[..., rows, slots]
        out[..., :tokens] = np.where(seen, out[..., :tokens], 0.0)
        out[..., tokens:] = weights[..., window:]
        return out

    def compact(pairs: np.ndarray, empty: float) -> np.ndarray:
        out = np.full((*pairs.shape[:-1], case.slots), empty)
        pairs[..., :tokens] = np.where(seen, pairs[..., :tokens], empty)
        out[..., rows, slots] = pairs[..., rows, columns]
        out[..., window:] = pairs[..., tokens:]
        return out

    def unflat(a: np.ndarray, shape: tuple[int, ...] = case.shape) -> np.ndarray:
        return a.reshape(*a.shape[:2], *shape, a.shape[-1])

    def with_additional(name: str, additional: str) -> np.ndarray:
        given = _clear_hidden(x[name], seen)
        return np.concatenate([given, x[additional]], 2) if case.additional else given

    keys = with_additional("key", "additional_keys")
    values = with_additional("value", "additional_values")
    scores = x["query"] @ keys.swapaxes(-1, -2)
    if case.rpb:
        bias = x["rpb"].reshape(case.heads, -1)[:, grid.relative]
        scores[..., :tokens] += np.where(grid.seen, bias, 0)
    g = dense(x["grad_attn"])
    grad_keys = g.swapaxes(-1, -2) @ x["query"]
    qk = {
        "attn": unflat(compact(scores, -np.inf)),
        "grad_query": unflat(g @ keys),
        "grad_key": unflat(grad_keys[:, :, :tokens], case.keys_shape),
    }
    attn = dense(x["attn"])
    grad_values = attn.swapaxes(-1, -2) @ x["grad_output"]
    av = {
        "output": unflat(attn @ values),
        "grad_attn": unflat(compact(x["grad_output"] @ values.swapaxes(-1, -2), 0.0)),
        "grad_value": unflat(grad_values[:, :, :tokens], case.keys_shape),
    }
    if case.additional:
        qk["grad_additional_keys"] = grad_keys[:, :, tokens:]
        av["grad_additional_values"] = grad_values[:, :, tokens:]
    if case.rpb:
        qk["grad_rpb"] = _scatter_rpb(case, grid, g[..., :tokens])
    return qk, av
