"""Parts of a grid in PyTorch: glued together they are the whole. Also what a part refuses."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import cases
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

from test_torch_random import check_fused, mask_of, to_torch  # noqa: E402
from torch_cases import AV, FUSED, QK  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

COUNTS = pytest.mark.parametrize("count", [15, cases.long_unless(False, 120)])
Part = tuple[tuple[int, ...], ...]  # offset and number of the queries, and of the keys, per axis


def whole_cases(count: int, seed: int) -> list[cases.Case]:
    """Of whole grids, in the types whose sums of rounded gradients are worth comparing."""
    rng = np.random.default_rng(seed)
    drawn = (case for case in map(cases.random_case, itertools.repeat(rng)) if not case.has_parts)
    return [
        replace(case, dtype="float64" if case.seed % 3 else "float32")
        for case in itertools.islice(drawn, count)
    ]


def parts_of(case: cases.Case) -> list[Part]:
    """The grid cut into up to three pieces along each axis, with the keys that each needs and, of
    some, a few more."""
    rng = np.random.default_rng(case.seed)
    boundary = case.boundary or ("shift",) * case.rank
    axes = []
    for i, length in enumerate(case.shape):
        window = (case.kernel_size[i], case.stride[i], case.dilation[i], case.is_causal[i])
        cuts = sorted({0, length, *rng.integers(0, length, 2).tolist()})
        pieces = []
        for begin, end in itertools.pairwise(cuts):
            first, last = natten.key_range(
                begin,
                end - begin,
                length,
                window[0],
                stride=window[1],
                dilation=window[2],
                is_causal=window[3],
                boundary=boundary[i],
            )
            if rng.random() < 0.5:
                first, last = first - int(rng.integers(0, 3)), last + int(rng.integers(0, 3))
            if boundary[i] == "circular":
                last = min(last, first + length)
            pieces.append((begin, end - begin, first, last - first))
        axes.append(pieces)
    return [tuple(zip(*pieces, strict=True)) for pieces in itertools.product(*axes)]


class Slices:
    """Takes a part out of tensors, and adds gradients of parts to those of the whole."""

    def __init__(self, case: cases.Case, part: Part) -> None:
        boundary = case.boundary or ("shift",) * case.rank
        queries, keys, is_token = [], [], []
        for i, length in enumerate(case.shape):
            begin, count, first, number = (numbers[i] for numbers in part)
            queries.append(torch.arange(begin, begin + count))
            tokens = torch.arange(first, first + number)
            circular = boundary[i] == "circular"
            is_token.append((tokens >= 0) & (tokens < length) | circular)
            keys.append(tokens % length if circular else tokens.clamp(0, length - 1))
        self.queries = torch.meshgrid(*queries, indexing="ij")
        self.keys = torch.meshgrid(*keys, indexing="ij")
        self.is_token = torch.stack(torch.meshgrid(*is_token, indexing="ij")).all(0)

    def of_queries(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x[(slice(None),) * axis + self.queries]

    def of_keys(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """NaN where the part overhangs the grid."""
        x = x[(slice(None),) * axis + self.keys]
        if x.dtype == torch.bool:
            return x
        beyond = ~self.is_token.view(*self.is_token.shape, *(1,) * (x.ndim - axis - len(self.keys)))
        return x.masked_fill(beyond, torch.nan)

    def put_queries(self, into: torch.Tensor, x: torch.Tensor, axis: int) -> None:
        into[(slice(None),) * axis + self.queries] = x

    def add_keys(self, into: torch.Tensor, x: torch.Tensor, axis: int) -> None:
        at = tuple(index[self.is_token] for index in self.keys)
        x = x.movedim(tuple(range(axis, axis + len(at))), tuple(range(len(at))))
        assert (x[~self.is_token] == 0).all(), "padding has a gradient"
        into.movedim(tuple(range(axis, axis + len(at))), tuple(range(len(at)))).index_put_(
            at, x[self.is_token], accumulate=True
        )


def options_of(case: cases.Case, part: Part) -> dict[str, Any]:
    query_offset, _, key_offset, _ = part
    return case.neighborhood | dict(
        query_offset=query_offset, key_offset=key_offset, grid_size=case.shape
    )


def run(function: Any, inputs: dict, incoming: list, **options: Any) -> tuple[list, dict]:
    """(results, gradients)."""
    inputs = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    results = function(**inputs, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    grads = torch.autograd.grad(results, list(inputs.values()), incoming)
    return results, {f"grad_{n}": g for n, g in zip(inputs, grads, strict=True)}


def check_glued(
    case: cases.Case,
    function: Any,
    inputs: dict,
    incoming: list,
    mask: dict,
    axis: int,
    of_queries: set[str],
    **options: Any,
) -> None:
    """`axis`: the first of the grid. `of_queries`: inputs that have a row for each query."""
    results, want = run(function, inputs, incoming, **case.neighborhood, **mask, **options)
    glued = [torch.full_like(x, torch.nan) for x in results]
    sums = {
        n: torch.full_like(x, torch.nan) if n.removeprefix("grad_") in of_queries
        else torch.zeros_like(x)
        for n, x in want.items()
    }  # fmt: skip
    for part in parts_of(case):
        slices = Slices(case, part)
        given = {}
        for name, x in inputs.items():
            if name in of_queries:
                x = slices.of_queries(x, axis)
            elif name in ("key", "value"):
                x = slices.of_keys(x, axis)
            given[name] = x
        part_mask = {n: slices.of_keys(x, 1) for n, x in mask.items()}
        part_results, grads = run(
            function,
            given,
            [slices.of_queries(x, axis) for x in incoming],
            **options_of(case, part),
            **part_mask,
            **options,
        )
        for whole, x in zip(glued, part_results, strict=True):
            slices.put_queries(whole, x, axis)
        for name, grad in grads.items():
            plain = name.removeprefix("grad_")
            if plain in of_queries:
                slices.put_queries(sums[name], grad, axis)
            elif plain in ("key", "value"):
                slices.add_keys(sums[name], grad, axis)
            else:
                sums[name] += grad
    for got, whole in zip(glued, results, strict=True):
        assert torch.equal(got, whole), f"another result of parts of {case}"
    for name, got in sums.items():
        if name.removeprefix("grad_") in of_queries:
            assert torch.equal(got, want[name]), f"another {name} of parts of {case}"
        else:
            error = cases.relative_error(got.numpy(), want[name].numpy(), float(len(got) ** 0.5))
            assert error <= cases.GRADIENT_BOUND[case.dtype], f"{name}: {error} of {case}"


def check_by_the_best(*args: Any, **options: Any) -> str:
    """`check_glued` by one backend, as bits are compared: the best that runs all parts, and its
    name."""
    try:
        check_glued(*args, **options, backend="fused")
        return "fused"
    except ValueError as error:
        if not str(error).startswith("backend: "):
            raise
        check_glued(*args, **options, backend="naive")
        return "naive"


@COUNTS
def test_parts_of_the_fused_operation(count, capsys):
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    backends: Counter[str] = Counter()
    for case in whole_cases(count, cases.SEED + 2 + count):
        arrays = case.fused_arrays()
        inputs = {n: to_torch(case, arrays[n]) for n in names if n in arrays}
        incoming = [to_torch(case, arrays[n]) for n in ("grad_output", "grad_logsumexp")]
        backends[
            check_by_the_best(
                case, FUSED[case.rank], inputs, incoming, mask_of(case, arrays), 1, {"query"},
                scale=case.scale, return_lse=True,
            )
        ] += 1  # fmt: skip
    with capsys.disabled():
        print(f"\nparts, fused: {dict(backends)}")


@COUNTS
def test_parts_of_the_unfused_operations(count, capsys):
    backends: Counter[str] = Counter()
    for case in whole_cases(count, cases.SEED + 3 + count):
        arrays = case.unfused_arrays()
        mask = mask_of(case, arrays)
        for function, names, result, of_queries in (
            (QK[case.rank], ("query", "key", "rpb", "additional_keys"), "grad_attn", {"query"}),
            (AV[case.rank], ("attn", "value", "additional_values"), "grad_output", {"attn"}),
        ):
            inputs = {n: to_torch(case, arrays[n]) for n in names if n in arrays}
            incoming = [to_torch(case, arrays[result])]
            backends[check_by_the_best(case, function, inputs, incoming, mask, 2, of_queries)] += 1
    with capsys.disabled():
        print(f"\nparts, unfused: {dict(backends)}")


def test_a_stream_of_tokens():
    """One query at a time against the keys so far: the rows of the whole, bit by bit."""
    q, k, v = torch.randn(3, 2, 20, 2, 8, dtype=torch.float64).unbind()
    options: dict[str, Any] = dict(kernel_size=5, dilation=2, is_causal=True, backend="naive")
    whole = F.na1d(q, k, v, **options)
    for i in range(20):
        first, end = natten.key_range(i, 1, 20, 5, dilation=2, is_causal=True)
        assert end == i + 1
        row = F.na1d(
            q[:, i : i + 1],
            k[:, first:end],
            v[:, first:end],
            **options,
            query_offset=i,
            key_offset=first,
            grid_size=20,
        )
        assert torch.equal(row, whole[:, i : i + 1])


def test_offsets_without_a_grid_size():
    """The grid is then that of the keys."""
    q, k, v = (torch.randn(1, n, 2, 4, dtype=torch.float64) for n in (3, 9, 9))
    rpb = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = dict(kernel_size=5, rpb=rpb, query_offset=4)
    results = [
        [out, *torch.autograd.grad(out.sin().sum(), rpb)]
        for out in (F.na1d(q, k, v, **options), F.na1d(q, k, v, **options, grid_size=9))
    ]
    heads_first = (x.movedim(-2, 1) for x in (q, k))
    attn = F.na1d_qk(*heads_first, **options)
    results.append([results[0][0], *torch.autograd.grad((attn * 0).sum(), rpb)])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert torch.equal(results[2][1], torch.zeros_like(rpb))
    assert torch.equal(
        F.na1d(q, k, v, 5, key_offset=0, query_offset=0), F.na1d(q, k, v, 5, grid_size=9)
    )


def test_none_is_not_zero():
    q, k = torch.randn(1, 3, 1, 2), torch.randn(1, 9, 1, 2)
    with pytest.raises(ValueError, match=r"^key: got shape .* the spatial shape must be 3"):
        F.na1d(q, k, k, 3)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, 6))
    want = F.na1d(padded, k, k, 3, backend="naive")[:, :3]
    assert torch.equal(F.na1d(q, k, k, 3, query_offset=0, backend="naive"), want)


def test_offsets_of_other_types():
    x = torch.randn(1, 6, 1, 2)
    want = F.na1d(x[:, 2:4], x, x, 3, query_offset=2)
    assert torch.equal(F.na1d(x[:, 2:4], x, x, 3, query_offset=np.int64(2)), want)
    assert torch.equal(F.na1d(x[:, 2:4], x, x, 3, query_offset=[2], grid_size=(6,)), want)
    assert torch.equal(F.na1d(x[:, 2:4], x, x, 3, query_offset=torch.tensor(2)), want)


@pytest.mark.parametrize("boundary", ["shift", "cut", "circular"])
def test_key_range_is_what_a_part_needs(boundary):
    """With these keys it runs; with one less at either end it is refused, and the range named."""
    rng = np.random.default_rng(cases.SEED)
    refused = 0
    for _ in range(200):
        length, k, s, d = cases.random_axis(rng, 20, boundary)
        causal = boundary != "circular" and bool(rng.random() < 0.3)
        window: dict[str, Any] = dict(stride=s, dilation=d, is_causal=causal, boundary=boundary)
        offset = int(rng.integers(0, length))
        count = int(rng.integers(1, length - offset + 1))
        begin, end = natten.key_range(offset, count, length, k, **window)
        assert (begin, end) == oracle.axis_key_range(
            offset, count, length, k, s, d, causal, boundary
        )
        q = torch.ones(1, count, 1, 2)
        options: dict[str, Any] = dict(
            kernel_size=k, **window, query_offset=offset, grid_size=length
        )
        for less_before, less_after in ((0, 0), (1, 0), (0, 1)):
            first, last = begin + less_before, end - less_after
            if first >= last:
                continue
            x = torch.ones(1, last - first, 1, 2)

            def attend(x: torch.Tensor = x, first: int = first) -> torch.Tensor:
                return F.na1d(q, x, x, **options, key_offset=first)  # noqa: B023

            if last - first == end - begin:
                torch.testing.assert_close(attend(), q)
                continue
            refused += 1
            message = (
                rf"^key: got tokens {first} to {last - 1} on axis 0; the windows of queries "
                rf"{offset} to {offset + count - 1} need tokens {begin} to {end - 1} "
            )
            with pytest.raises(ValueError, match=message):
                attend()
    assert refused > 200


def test_key_range_of_several_axes():
    got = natten.key_range(
        (3, 0), (2, 8), (9, 8), (3, 5), dilation=(2, 1), boundary=("cut", "shift")
    )
    assert got == ((1, 7), (0, 8))
    assert natten.key_range(3, 2, 9, 3, dilation=(2, 1)) == ((1, 7), (2, 6))
    assert natten.key_range([3], 2, 9, 3) == ((2, 6),)
    assert natten.key_range(3, 2, 9, 3) == (2, 6)


def draw_stream(seed: int) -> cases.Case:
    """One token, a few, or a line of them, whose windows reach far back."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    border = str(rng.choice(["shift", "cut", "circular"]))
    k = int(rng.integers(1, 6))
    stride, dilation = int(rng.integers(1, k + 1)), int(rng.integers(1, 3))
    length = stride * dilation * int(rng.integers(5, 10))
    kernel = ((int(rng.integers(510, 700)),), (int(rng.integers(64, 90)), k), (12, 9, k))[rank - 1]
    lines = ((), (), (9,))[rank - 1]  # of which all are seen
    time = (kernel[0] + 20) * (dilation if rank == 1 else 1)
    grid = (time, *lines, length)[:rank]
    count = int(rng.integers(1, 9)) if rank == 1 else length
    begin = grid[0] - count if rank == 1 else int(rng.integers(kernel[0] // 2, grid[0]))
    query_offset = (begin, *(4 for _ in lines), 0)[:rank]
    shape = (count,) if rank == 1 else (1, *(1 for _ in lines), length)
    kv_heads = int(rng.integers(1, 3))
    head_dim = int(rng.choice([8, 13, 16, 32]))
    return cases.Case(
        seed=seed,
        shape=shape,
        kernel_size=kernel,
        stride=(1,) if rank == 1 else (1,) * (rank - 1) + (stride,),
        dilation=(dilation,) if rank == 1 else (1,) * (rank - 1) + (dilation,),
        is_causal=(True, False, False)[:rank],
        batch=int(rng.integers(1, 3)),
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if rng.random() < 0.5 else int(rng.integers(1, 20)),
        dtype=str(rng.choice(cases.DTYPES)),
        scale=None,
        rpb=bool(rng.random() < 0.3),
        additional=int(rng.integers(0, 4)),
        boundary=("cut", "shift", border)[:rank] if rank != 2 else ("cut", border),
        key_shape=grid,
        query_offset=query_offset,
        key_offset=(0,) * rank,
        grid_size=grid,
        mask_batch=1 if rng.random() < 0.3 else None,
    )


@pytest.mark.parametrize("count", [6, cases.long_unless(False, 30)])
def test_streams(count):
    errors = cases.Errors("torch streams")
    for seed in range(cases.SEED, cases.SEED + count):
        check_fused(draw_stream(seed), errors)
