"""The judge of everything: neighborhood attention as dense attention with a mask, in float64.

Written from the definition and sharing no code with the library: which keys a query sees is found
by listing the tokens of its dilation group; gradients are those of masked softmax attention.
"""

from __future__ import annotations

import math

import numpy as np
from cases import Arrays, Case


def axis_windows(length: int, k: int, s: int, d: int, causal: bool) -> list[list[int]]:
    """For each token of an axis, the tokens it attends to, in slot order."""
    windows = []
    for i in range(length):
        group = [t for t in range(length) if t % d == i % d]
        n, p = len(group), group.index(i)
        if causal:
            leader = min((p // s) * s + s - 1, n - 1)
            positions = range(max(leader - k + 1, 0), p + 1)
        else:
            leader = min((p // s) * s + s // 2, n - 1)
            first = leader - k // 2
            while first < 0:
                first += 1
            while first + k > n:
                first -= 1
            positions = range(first, first + k)
        windows.append([group[position] for position in positions])
    return windows


class Grid:
    """Which query token sees which key token, in which slot and at which relative position: dense
    matrices over all pairs of tokens, row-major. -1 where the key is not seen."""

    def __init__(self, case: Case) -> None:
        self.slot = self.relative = np.zeros((1, 1), int)
        for length, k, s, d, causal in zip(
            case.shape, case.kernel_size, case.stride, case.dilation, case.is_causal, strict=True
        ):
            slot, relative = np.full((2, length, length), -1)
            for query, keys in enumerate(axis_windows(length, k, s, d, causal)):
                for j, key in enumerate(keys):
                    slot[query, key] = j
                    relative[query, key] = key // d - query // d + k - 1
            self.slot = _product(self.slot, slot, k)
            self.relative = _product(self.relative, relative, 2 * k - 1)
        self.seen = self.slot >= 0


def _product(outer: np.ndarray, inner: np.ndarray, base: int) -> np.ndarray:
    """Index matrices of two axes as one, in row-major order."""
    a, b = outer[:, None, :, None], inner[None, :, None, :]
    tokens = len(outer) * len(inner)
    return np.where((a < 0) | (b < 0), -1, a * base + b).reshape(tokens, tokens)


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

    def with_additional(name: str, additional: str) -> np.ndarray:
        parts = [name, additional] if case.additional else [name]
        return np.concatenate([heads_first(n) for n in parts], axis=2).repeat(group, axis=1)

    q, g, g_lse = (heads_first(n) for n in ("query", "grad_output", "grad_logsumexp"))
    k = with_additional("key", "additional_keys")
    v = with_additional("value", "additional_values")
    tokens = len(grid.seen)
    seen = np.concatenate([grid.seen, np.ones((tokens, case.additional), bool)], axis=1)
    scores = scale * q @ k.swapaxes(-1, -2)
    if case.rpb:
        bias = arrays["rpb"].reshape(case.heads, -1)[:, grid.relative]
        scores[..., :tokens] += np.where(grid.seen, bias, 0)
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    grad_weights = g @ v.swapaxes(-1, -2)
    row = (weights * grad_weights).sum(-1, keepdims=True) - g_lse[..., None]
    grad_scores = weights * (grad_weights - row)

    def ungroup(x: np.ndarray) -> np.ndarray:  # sums over the heads that share a key-value head
        b, _, n, dim = x.shape
        return x.reshape(b, case.kv_heads, group, n, dim).sum(2)

    grad_k = ungroup(scale * grad_scores.swapaxes(-1, -2) @ q)
    grad_v = ungroup(weights.swapaxes(-1, -2) @ g)

    def heads_last(x: np.ndarray) -> np.ndarray:
        x = np.moveaxis(x, 1, 2)
        return x.reshape(x.shape[0], *case.shape, *x.shape[2:])

    results = {
        "output": heads_last(weights @ v),
        "logsumexp": heads_last(largest + np.log(total))[..., 0],
        "grad_query": heads_last(scale * grad_scores @ k),
        "grad_key": heads_last(grad_k[:, :, :tokens]),
        "grad_value": heads_last(grad_v[:, :, :tokens]),
    }
    if case.additional:
        results["grad_additional_keys"] = np.moveaxis(grad_k[:, :, tokens:], 1, 2)
        results["grad_additional_values"] = np.moveaxis(grad_v[:, :, tokens:], 1, 2)
    if case.rpb:
        results["grad_rpb"] = _scatter_rpb(case, grid, grad_scores[..., :tokens])
    return results


def _scatter_rpb(case: Case, grid: Grid, pairs: np.ndarray) -> np.ndarray:
    """Sums a [B, H, queries, keys] matrix over batch and pairs at the same relative position."""
    shape = tuple(2 * k - 1 for k in case.kernel_size)
    result = np.zeros((case.heads, math.prod(shape)))
    for head in range(case.heads):
        total = pairs[:, head].sum(0)
        np.add.at(result[head], grid.relative[grid.seen], total[grid.seen])
    return result.reshape(case.heads, *shape)


def unfused(case: Case, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(results and gradients of qk, of av), float64, in the layouts of their arguments."""
    grid = Grid(case)
    tokens, window = len(grid.seen), case.slots - case.additional
    x = {n: _flat_grid(a, case.rank, 2) if "add" not in n and n != "rpb" else a
         for n, a in arrays.items()}  # fmt: skip
    rows, columns = np.nonzero(grid.seen)
    slots = grid.slot[rows, columns]

    def dense(weights: np.ndarray) -> np.ndarray:  # [..., slots] -> [..., keys + additional]
        out = np.zeros((*weights.shape[:-1], tokens + case.additional))
        out[..., rows, columns] = weights[..., rows, slots]
        out[..., tokens:] = weights[..., window:]
        return out

    def compact(pairs: np.ndarray, empty: float) -> np.ndarray:
        out = np.full((*pairs.shape[:-1], case.slots), empty)
        out[..., rows, slots] = pairs[..., rows, columns]
        out[..., window:] = pairs[..., tokens:]
        return out

    def unflat(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:2], *case.shape, a.shape[-1])

    def with_additional(name: str, additional: str) -> np.ndarray:
        return np.concatenate([x[name], x[additional]], 2) if case.additional else x[name]

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
        "grad_key": unflat(grad_keys[:, :, :tokens]),
    }
    attn = dense(x["attn"])
    grad_values = attn.swapaxes(-1, -2) @ x["grad_output"]
    av = {
        "output": unflat(attn @ values),
        "grad_attn": unflat(compact(x["grad_output"] @ values.swapaxes(-1, -2), 0.0)),
        "grad_value": unflat(grad_values[:, :, :tokens]),
    }
    if case.additional:
        qk["grad_additional_keys"] = grad_keys[:, :, tokens:]
        av["grad_additional_values"] = grad_values[:, :, tokens:]
    if case.rpb:
        qk["grad_rpb"] = _scatter_rpb(case, grid, g[..., :tokens])
    return qk, av
