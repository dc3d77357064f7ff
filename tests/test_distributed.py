"""One grid over many processes, in PyTorch: each rank's part of the results is that of the whole,
what travels is what `halo_bytes` says, and no rank waits for one that refused a call."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import itertools
import multiprocessing
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from ranks import environment_of_ranks, run_ranks  # noqa: E402
from test_torch_random import mask_of, statistic, to_torch  # noqa: E402
from torch_cases import AV, FUSED, QK  # noqa: E402

import natten  # noqa: E402
from natten import _halos  # noqa: E402

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402

from natten.torch import _distributed  # noqa: E402

PROCESSES, LIMIT_S = 8, 240
TIMEOUT_S = 60  # of a rank that waits for another
SHORT_TIMEOUT_S = 4
LEAST_TO_CUT = _distributed._LEAST_TO_CUT
FEW, MANY = 24, 160  # random cases

# ---- what ranks do ----


def meshes() -> list[DeviceMesh]:
    """Of two, four and all processes; the smaller ones several times beside each other."""
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("a", "b", "c"))
    wide = init_device_mesh("cpu", (2, 4), mesh_dim_names=("d", "e"))
    return [
        init_device_mesh("cpu", (8,)), wide, cube, cube["b", "c"], wide["e"], cube["a"]
    ]  # fmt: skip


class Sent:
    """Counts the bytes of messages, and collectives other than reductions."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    def __enter__(self) -> Sent:
        self.batch = dist.batch_isend_irecv
        dist.batch_isend_irecv = self.counted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.batch_isend_irecv = self.batch

    def counted(self, operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                self.sent += operation.tensor.nbytes
            else:
                self.received += operation.tensor.nbytes
        return self.batch(operations)


def random_placements(rng: np.random.Generator, mesh: DeviceMesh, case: cases.Case) -> list[Any]:
    """What each axis of the mesh cuts: "B", "H", an axis of the grid, or None."""
    cuts: list[Any] = []
    heads = 1
    for n in mesh.shape:
        options = [*range(case.rank), *range(case.rank), "B", None]
        if case.kv_heads % (heads * n) == 0 or (
            case.kv_heads == 1 and case.heads % (heads * n) == 0
        ):
            options.append("H")
        cuts.append(options[int(rng.integers(len(options)))])
        if cuts[-1] == "H":
            heads *= n
    return cuts


def placed(
    x: torch.Tensor, mesh: DeviceMesh, cuts: list[Any], axes: dict[Any, int]
) -> torch.Tensor:
    """A DTensor whose axes `axes` are cut."""
    placements = [Shard(axes[c]) if c in axes else Replicate() for c in cuts]
    # As a view, so that what requires a gradient is the whole; every rank has the same.
    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_(
        x.requires_grad
    )


def check_local(name: str, got: torch.Tensor, want: torch.Tensor, bound: float = 0.0) -> None:
    """A rank's part of a result against the whole, to the bit without a bound."""
    assert isinstance(got, DTensor), name
    assert got.shape == want.shape, f"{name}: {got.shape}, expected {want.shape}"
    part = distribute_tensor(want.detach(), got.device_mesh, got.placements, src_data_rank=None)
    mine, part = got.to_local().detach(), part.to_local()
    assert mine.shape == part.shape, f"{name}: {mine.shape}, expected {part.shape}"
    if not bound:
        assert mine.dtype == part.dtype and torch.equal(mine, part), name
        return
    norm = float(want.detach().double().norm())
    error = float((mine.double() - part.double()).norm())
    assert error <= bound * max(norm, 1e-3), f"{name}: error {error / norm:.3g}"


def run_case(case: cases.Case, mesh: DeviceMesh, unfused: bool) -> None:
    rng = np.random.default_rng(case.seed)
    cuts = random_placements(rng, mesh, case)
    if unfused:
        cuts = [None if c == "H" and case.heads % 2 else c for c in cuts]
        run_unfused(case, mesh, cuts, rng)
    else:
        run_fused(case, mesh, cuts, rng)


def leaf(case: cases.Case, x: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    return to_torch(case, x, dtype).requires_grad_()


def differentiated(
    results: list[torch.Tensor], incoming: list[torch.Tensor], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(results, list(inputs.values()), incoming)
    return dict(zip(inputs, found, strict=True))


def compare(
    case: cases.Case,
    mesh: DeviceMesh,
    cuts: list[Any],
    function: Callable[..., Any],
    arrays: cases.Arrays,
    axes_of: dict[str, dict[Any, int]],
    plain: set[str],
    incoming: list[str],
    scale: dict[str, Any],
) -> None:
    """`axes_of`: which axis of each argument each of the cuts cuts, where any; `plain`: arguments
    that are no DTensors; `incoming`: the gradients of the results."""
    mask = mask_of(case, arrays)
    names = [name for name in axes_of if name in arrays]

    def called(inputs: dict[str, Any], grads: list[Any], key_mask: Any) -> tuple[list, dict]:
        options = {} if key_mask is None else {"key_mask": key_mask}
        results = function(**inputs, **case.neighborhood, **options, **scale)
        results = list(results) if isinstance(results, tuple) else [results]
        return results, differentiated(results, grads, inputs)

    whole = {n: leaf(case, arrays[n]) for n in names}
    precise = {n: leaf(case, arrays[n], "float64") for n in names}
    types = [None, statistic(case)]
    grads = [to_torch(case, arrays[n], t) for n, t in zip(incoming, types, strict=False)]
    want, _ = called(whole, grads, mask.get("key_mask"))
    _, want_grads = called(precise, [g.double() for g in grads], mask.get("key_mask"))
    local = {
        n: leaf(case, arrays[n]) if n in plain else placed(whole[n], mesh, cuts, axes_of[n])
        for n in names
    }
    key_mask = mask.get("key_mask")
    if key_mask is not None and "key_mask" not in plain:
        axes: dict[Any, int] = {i: 1 + i for i in range(case.rank)}
        if len(key_mask) > 1:
            axes["B"] = 0
        key_mask = placed(key_mask, mesh, cuts, axes)
    first = axes_of[names[0]]
    result_axes = {c: axis for c, axis in first.items()}
    local_grads = [placed(g, mesh, cuts, result_axes) for g in grads]
    with Sent() as sent, CommDebugMode() if case.seed % 2 else Sent() as seen:
        got, got_grads = called(local, local_grads, key_mask)
    if isinstance(seen, CommDebugMode):
        collectives = {str(op) for op in seen.get_comm_counts()}
        assert all("reduce" in op and "scatter" not in op for op in collectives), collectives
    for name, x, y in zip(incoming, got, want, strict=True):
        check_local(name, x, y)
    for n, x in got_grads.items():
        bound = cases.GRADIENT_BOUND[case.dtype]
        if n in plain:
            assert not isinstance(x, DTensor)
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        check_local(f"gradient of {n}", x, want_grads[n], bound)
    check_bytes(case, mesh, cuts, local, key_mask, sent)


def check_bytes(
    case: cases.Case,
    mesh: DeviceMesh,
    cuts: list[Any],
    local: dict[str, torch.Tensor],
    key_mask: Any,
    sent: Sent,
) -> None:
    """What travelled forward and backward is what `halo_bytes` says."""
    dims = [[d for d, c in enumerate(cuts) if c == i] for i in range(case.rank)]
    coordinate = mesh.get_coordinate()
    part = [0] * case.rank
    for i, of_axis in enumerate(dims):
        for d in of_axis:
            part[i] = part[i] * mesh.size(d) + coordinate[d]

    first = next(iter(local.values())).to_local()
    if first.numel() == 0:  # nor have the ranks that this one could hear of
        assert (sent.sent, sent.received) == (0, 0)
        return
    first_axis = 2 if "attn" in local or "value" not in local else 1

    def count(with_mask: bool) -> natten.distributed.HaloBytes:
        size = 0
        for name in ("key", "value"):
            if name in local:  # of the heads of replicated keys each rank needs a few
                x, heads = local[name], first.shape[first_axis - 1]
                if first_axis == 1:
                    heads = max(1, first.shape[-2] // (case.heads // case.kv_heads))
                size += len(x.to_local()) * heads * x.shape[-1] * x.element_size()
        if with_mask and isinstance(key_mask, DTensor):
            size += len(key_mask.to_local())
        return natten.distributed.halo_bytes(
            case.shape, [[mesh.size(d) for d in of_axis] or 1 for of_axis in dims],
            part=part, token_bytes=size, **case.neighborhood,
        )  # fmt: skip

    forward, backward = count(True), count(False)
    got = sent.sent, sent.received
    want = forward.sent + backward.received, forward.received + backward.sent
    assert got == want, f"sent and received {got}, expected {want}"


def some(rng: np.random.Generator, names: list[str]) -> set[str]:
    return {n for n in names if rng.random() < 0.5}


def run_fused(
    case: cases.Case, mesh: DeviceMesh, cuts: list[Any], rng: np.random.Generator
) -> None:
    grid = {i: 1 + i for i in range(case.rank)}
    of_keys: dict[Any, int] = {"B": 0, **grid}
    if case.kv_heads > 1 and rng.random() < 0.7:
        of_keys["H"] = case.rank + 1
    additional: dict[Any, int] = {} if rng.random() < 0.5 else {"B": 0}
    axes_of = {
        "query": {"B": 0, **grid, "H": case.rank + 1},
        "key": of_keys,
        "value": of_keys,
        "rpb": {} if rng.random() < 0.5 else {"H": 0},
        "additional_keys": additional,
        "additional_values": additional,
    }
    plain = some(rng, ["rpb", "additional_keys", "additional_values", "key_mask"])
    scale = {"scale": case.scale, "return_lse": True}
    compare(case, mesh, cuts, FUSED[case.rank], case.fused_arrays(), axes_of, plain,
            ["grad_output", "grad_logsumexp"], scale)  # fmt: skip


def run_unfused(
    case: cases.Case, mesh: DeviceMesh, cuts: list[Any], rng: np.random.Generator
) -> None:
    arrays = case.unfused_arrays()
    grid = {i: 2 + i for i in range(case.rank)}
    full: dict[Any, int] = {"B": 0, "H": 1, **grid}
    plain = some(rng, ["rpb", "additional_keys", "additional_values", "key_mask"])
    axes_of = {"query": full, "key": full, "rpb": {}, "additional_keys": {"B": 0, "H": 1}}
    compare(case, mesh, cuts, QK[case.rank], arrays, axes_of, plain, ["grad_attn"], {})
    axes_of = {"attn": full, "value": full, "additional_values": {}}
    compare(case, mesh, cuts, AV[case.rank], arrays, axes_of, plain, ["grad_output"], {})


def whole_cases(count: int, seed: int) -> Iterator[cases.Case]:
    rng = np.random.default_rng(seed)
    drawn = (case for case in map(cases.random_case, itertools.repeat(rng)) if not case.has_parts)
    return itertools.islice(drawn, count)


def run_random(rank: int, begin: int, end: int) -> None:
    available = meshes()
    for i, case in enumerate(whole_cases(end, cases.SEED + 18)):
        if i >= begin:
            mesh = available[i % len(available)]
            # Problems are small; but for some of them, the inside of parts goes by itself.
            _distributed._LEAST_TO_CUT = 1 if i % 3 else LEAST_TO_CUT
            try:
                run_case(case, mesh, unfused=i % 4 == 3)
            except Exception as error:
                raise AssertionError(f"case {i} on rank {rank}, {mesh}: {case}") from error


def run_modules(rank: int) -> None:
    """Modules with parameters of any kind train on parts as on the whole."""
    mesh = init_device_mesh("cpu", (2, 4))
    for seed, (fused, kind, rank_of_grid) in enumerate(
        [(True, "plain", 2), (False, "DTensor", 1), (True, "DTensor", 2), (False, "plain", 1)]
    ):
        torch.manual_seed(seed)
        module_type = (natten.NeighborhoodAttention1D, natten.NeighborhoodAttention2D)
        module = module_type[rank_of_grid - 1](
            12, 2, 3, rel_pos_bias=True, boundary="circular" if seed % 3 else "cut"
        ).double()
        shape = (2, *(18, 9)[:rank_of_grid], 12)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(shape, dtype=torch.float64)
        natten.use_fused_na(fused)
        try:
            want = module(x)
            wanted = torch.autograd.grad(want, [x, *module.parameters()], grad)
            placements = [[Shard(rank_of_grid), Shard(1)], [Shard(0), Shard(1)]][seed % 2]
            if kind == "DTensor":
                distribute_module(module, mesh)
            part, grad = (
                distribute_tensor(t.detach(), mesh, placements, src_data_rank=None)
                for t in (x, grad)
            )
            part.requires_grad_()
            with CommDebugMode() as seen:
                got = module(part)
                got.backward(grad)  # which CommDebugMode bears of modules, unlike autograd.grad
            assert all("all_reduce" in str(op) or "allreduce" in str(op)
                       for op in seen.get_comm_counts()), seen.get_comm_counts()  # fmt: skip
        finally:
            natten.use_fused_na(False)
        check_local("output", got, want, 1e-13)
        found = [part.grad, *(p.grad for p in module.parameters())]
        check_local("gradient of x", found[0], wanted[0], 1e-12)
        for (name, _), g, w in zip(module.named_parameters(), found[1:], wanted[1:], strict=True):
            assert isinstance(g, DTensor) == (kind == "DTensor")
            g = g.full_tensor() if isinstance(g, DTensor) else g
            assert (g - w).norm() <= 1e-12 * w.norm(), name


def run_halo_exchange(rank: int) -> None:
    """A convolution over parts, with its gradients, by the public function."""
    mesh = init_device_mesh("cpu", (2, 4))
    torch.manual_seed(0)
    x = torch.randn(2, 11, 13, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 5, dtype=torch.float64)

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x.movedim(-1, 1), weight).movedim(1, -1)

    want = convolved(torch.nn.functional.pad(x, (0, 0, 2, 2, 1, 1)))
    grad = torch.randn_like(want)
    (wanted,) = torch.autograd.grad(want, x, grad, retain_graph=True)
    placements = [Shard(1), Shard(2)]
    part = distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_()
    (around, other), offset = natten.distributed.halo_exchange(
        [part, part.detach() > 0], (3, 5), boundary="cut"
    )
    ends = [o + n for o, n in zip(offset, around.shape[1:3], strict=True)]
    whole = x[:, offset[0] : ends[0], offset[1] : ends[1]]
    assert torch.equal(around, whole) and torch.equal(other, whole > 0)
    (top, bottom), (left, right) = (
        _halos.chunks(n, [count])[i]
        for n, count, i in zip((11, 13), (2, 4), mesh.get_coordinate(), strict=True)
    )
    # Outside the grid there is nothing, which convolution takes for zeros.
    missing = (0, 0, max(2 - left, 0), max(right + 2 - 13, 0), max(1 - top, 0),
               max(bottom + 1 - 11, 0))  # fmt: skip
    got = convolved(torch.nn.functional.pad(around, missing))
    assert torch.allclose(got, want[:, top:bottom, left:right], rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad(got, part, grad[:, top:bottom, left:right])
    check_local("gradient", found, wanted, 1e-12)

    # Twice differentiable: what goes home comes back.
    line = distribute_tensor(
        torch.arange(16.0, dtype=torch.float64), mesh,
        [Replicate(), Shard(0)], src_data_rank=None,
    ).requires_grad_()  # fmt: skip
    around, _ = natten.distributed.halo_exchange(line, 3, boundary="circular", first_axis=0)
    (first,) = torch.autograd.grad(around.pow(3).sum(), line, create_graph=True)
    (second,) = torch.autograd.grad(first.to_local().sum(), line)
    # Every token is in its own part, and those at ends of parts are in a neighbor's as well.
    copies = torch.tensor([2.0, 1, 1, 2] * 4, dtype=torch.float64)
    tokens = torch.arange(16.0, dtype=torch.float64)
    check_local("first derivative", first, copies * 3 * tokens**2, 1e-12)
    check_local("second derivative", second, copies * 6 * tokens, 1e-12)


def run_twice(rank: int) -> None:
    """Second derivatives, where the inside of a part is computed by itself, and of a part that
    gives and needs nothing."""
    mesh = init_device_mesh("cpu", (2, 4))
    _distributed._LEAST_TO_CUT = 1
    for is_causal in (False, True):
        torch.manual_seed(1)
        q, k, v, w = (torch.randn(1, 14, 36, 2, 4, dtype=torch.float64) for _ in range(4))
        placements = [Shard(1), Shard(2)]

        def twice(*tensors: torch.Tensor, **options: Any) -> list[torch.Tensor]:
            *inputs, weight = tensors
            out = natten.na2d(*inputs, kernel_size=(3, 5), **options)
            first = torch.autograd.grad(out, inputs, weight, create_graph=True)
            return [*first, *torch.autograd.grad(first, [*inputs, weight], inputs)]

        whole = [x.clone().requires_grad_() for x in (q, k, v, w)]
        want = twice(*whole, is_causal=is_causal)
        parts = [
            distribute_tensor(x, mesh, placements, src_data_rank=None).requires_grad_()
            for x in (q, k, v, w)
        ]
        got = twice(*parts, is_causal=is_causal)
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            check_local(f"derivative {i}", x, y, 1e-12)


def message_of(function: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def tokens_on(mesh: DeviceMesh, placements: list[Any], *shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return distribute_tensor(torch.randn(*shape), mesh, placements, src_data_rank=None)


def run_bad(rank: int) -> None:
    """What cannot work, or is not the same everywhere, is refused on all ranks."""
    mesh = init_device_mesh("cpu", (2, 4))
    rows, columns = [Shard(1), Replicate()], [Replicate(), Shard(2)]
    x, y = (tokens_on(mesh, p, 1, 8, 12, 2, 4) for p in (rows, columns))
    partial = DTensor.from_local(
        torch.randn(1, 8, 12, 2, 4), mesh, [Partial(), Replicate()], run_check=False
    )
    of_heads = tokens_on(mesh, [Shard(4), Replicate()], 1, 8, 12, 2, 4)
    every = [
        (lambda: natten.na2d(partial, x, x, 3), r"query: got placements .*Partial.*redistribute"),
        (lambda: natten.na2d(x, partial, partial, 3), r"key: got placements .*Partial"),
        (lambda: natten.na2d(x, x, y, 3), r"value: got placements .* where query has .*like query"),
        (lambda: natten.na2d(x, y, y, 3), r"key: got placements .* where query has .*like query"),
        (lambda: natten.na2d(of_heads, x, x, 3), r"query: .*last axis must be whole"),
        (lambda: natten.na2d(x, x, x, 9), r"kernel_size: got"),
        (lambda: natten.na2d(x, x, x, 3, query_offset=(0, 0)), r"query_offset: got .* DTensors"),
        (lambda: natten.attention(*[tokens_on(mesh, rows, 1, 8, 2, 4)] * 3), r"see all keys"),
    ]
    for function, match in every:
        said = message_of(function, ValueError)
        assert re.search(match, said), said
    plain = torch.randn(1, 8, 12, 2, 4)
    for function in (lambda: natten.na2d(x, plain, x, 3), lambda: natten.na2d(plain, x, x, 3)):
        assert re.search(r"(key|query): got a tensor that is no DTensor",
                         message_of(function, TypeError))  # fmt: skip
    # Heads that are cut through groups.
    z = [tokens_on(mesh, [Replicate(), Shard(3)], 1, 8, 12, n, 4) for n in (12, 6)]
    said = message_of(lambda: natten.na2d(z[0], z[1], z[1], 3), ValueError)
    assert re.search(r"key: .*6 heads and the 12", said), said

    # One rank's call is another, or is refused there.
    for one, others in (
        (lambda: natten.na2d(x, x, x, (3, 5)), r"the window: got .* something else"),
        (lambda: natten.na2d(x, x, x, 3, scale=0.7), r"scale: got None .* something else"),
        (lambda: natten.na2d(y, y, y, 3, scale=0.5), r"query: got .* something else"),
        (lambda: natten.na2d(x, x, y, 3), r"rank 5 refused this call"),
        (lambda: natten.na2d(partial, x, x, 3), r"rank 5 refused this call"),
    ):
        if others.startswith("query"):
            other = lambda: natten.na2d(x, x, x, 3, scale=0.5)  # noqa: E731
        else:
            other = lambda: natten.na2d(x, x, x, 3)  # noqa: E731
        said = message_of(one if rank == 5 else other, ValueError)
        if rank != 5:
            assert re.search(others, said), said
        else:
            assert re.search("got", said), said
    # A part of another size.
    part = x.to_local()[:, : 3 if rank == 2 else 4]
    wrong = DTensor.from_local(part, mesh, rows, run_check=False, shape=x.shape, stride=x.stride())
    said = message_of(lambda: natten.na2d(wrong, x, x, 3), ValueError)
    expected = r"query: rank 2 holds \[1, 3, 12, 2, 4\] of \[1, 8, 12, 2, 4\]"
    assert re.search(expected if rank == 2 else "rank 2 refused", said), said
    assert natten.na2d(x, x, x, 3).shape == x.shape  # all is well still


def run_late(rank: int) -> None:
    """A rank that goes another way after all have agreed, and one that ends: the others get an
    error, within the timeout."""
    timeout = datetime.timedelta(seconds=SHORT_TIMEOUT_S)
    groups = [dist.new_group(list(range(PROCESSES)), timeout=timeout) for _ in range(2)]
    for i, group in enumerate(groups):
        mesh = DeviceMesh.from_group(group, "cpu")
        x = tokens_on(mesh, [Shard(1)], 1, 32, 1, 4)
        natten.na1d(x, x, x, 5)
        if rank == 3 and i == 1:
            return
        kernel_size = 7 if rank == 3 and i == 0 else 5
        start = time.monotonic()
        # Rank 7 hears of those at its sides only, who fail after it has all that it needs.
        try:
            for _ in range(PROCESSES):
                natten.na1d(x, x, x, kernel_size)
        except RuntimeError as error:
            assert "natten: ranks that hold parts of one grid could not exchange" in str(error)
        else:
            raise AssertionError("no error")
        assert time.monotonic() - start < PROCESSES * SHORT_TIMEOUT_S
        time.sleep(SHORT_TIMEOUT_S)


def run_example(rank: int) -> None:
    """examples/distributed.py: the same losses on a mesh as on none."""
    folder = Path(__file__).parent.parent / "examples"
    spec = importlib.util.spec_from_file_location("distributed", folder / "distributed.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    natten.use_fused_na()
    try:
        want = example.train(None, *example.make(None), range(3))
        mesh = init_device_mesh("cpu", (2, 4))
        got = example.train(mesh, *example.make(mesh), range(3))
        assert np.allclose(got, want, rtol=1e-10), f"{got}, expected {want}"
        assert want[-1] < want[0]
    finally:
        natten.use_fused_na(False)


JOBS: dict[str, Callable[[int], None]] = {
    "few": lambda rank: run_random(rank, 0, FEW),
    "modules": run_modules,
    "halo_exchange": run_halo_exchange,
    "twice": run_twice,
    "bad": run_bad,
    "example": run_example,
    "many": lambda rank: run_random(rank, FEW, MANY),
    "late": run_late,  # after which ranks do not wait for each other any more
}


def work(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    results = {}
    for name in names:
        start = time.monotonic()
        try:
            JOBS[name](rank)
            results[name] = ""
        except Exception:  # for the test that is about this
            results[name] = traceback.format_exc()
        results[f"{name}, seconds"] = time.monotonic() - start
        torch.save(results, f"{folder}/{rank}")
        if results[name] or name == "late":
            return  # the others may be elsewhere
        dist.barrier()
    dist.destroy_process_group()


# ---- the tests ----


def run_on_ranks(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """What each rank says of each job; nothing where all is well."""
    # Forks of a process that has imported the most but started no thread are quicker to start. It
    # finds packages, but nothing of this folder, which pytest has added to the path.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "natten.functional"])
    run_ranks(work, [str(folder), names], PROCESSES, LIMIT_S, start_method="forkserver")
    found = [torch.load(folder / str(rank)) for rank in range(PROCESSES)]
    for name in names:
        print(name, max(of_rank.get(f"{name}, seconds", 0) for of_rank in found), "s")
    return {name: [of_rank.get(name, "not run") for of_rank in found] for name in names}


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with environment_of_ranks():
        yield


def check_jobs(folder: Path, names: list[str]) -> None:
    for name, said_by_ranks in run_on_ranks(folder, names).items():
        for rank, said in enumerate(said_by_ranks):
            assert not said, f"{name}, rank {rank}: {said}"


def test_parts_are_those_of_the_whole(environment, tmp_path):
    check_jobs(tmp_path, ["few", "modules", "halo_exchange", "twice", "bad"])


@pytest.mark.long
def test_more_parts_and_ranks_that_fail(environment, tmp_path):
    check_jobs(tmp_path, ["many", "example", "late"])


@pytest.mark.long
def test_torchrun_runs_the_example(environment):
    example = Path(__file__).parent.parent / "examples" / "distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
               str(example), "--steps=2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):  # which may say it on one line
        assert re.search(rf"rank {rank} at .0, {rank}.: HaloBytes", done.stdout), done.stdout
    assert re.search(r"^ +1  \d+\.\d+  \d+\.\d+$", done.stdout, re.M), done.stdout


def test_blocks_are_the_queries_of_a_part():
    """Each query is in one block, whose windows see what is there for it; those inside see nothing
    else, and any query beside them does."""
    rng = np.random.default_rng([cases.SEED, 18])
    seen = 0
    for case in whole_cases(200, int(rng.integers(2**32))):
        parts = [(int(rng.integers(1, 5)),) for _ in case.shape]
        window = {name: tuple(values) for name, values in case.neighborhood.items()}
        halos = _halos.halos_of(case.shape, parts, window)
        for part in itertools.product(*(range(len(axis.held)) for axis in halos.axes)):
            count = np.zeros(case.shape, int)
            blocks = halos.blocks(part)
            for block in blocks:
                count[tuple(slice(*r) for r in block.queries)] += 1
                for axis, queries, needed in zip(
                    halos.axes, block.queries, block.needed, strict=True
                ):
                    low, high = axis.needed_of(queries)
                    assert needed[0] <= low and high <= needed[1], (case, part)
            held = tuple(slice(*r) for r in halos.held(part))
            assert (
                count[held].all() and count.sum() == count[held].size == count.max() * count.sum()
            )
            if blocks[0].is_inside:
                seen += len(blocks) > 1
                assert blocks[0].needed == halos.held(part)
                for axis, (low, high), (begin, end) in zip(
                    halos.axes, blocks[0].queries, blocks[0].needed, strict=True
                ):
                    for more in ((low - 1, high), (low, high + 1)):
                        if begin <= more[0] and more[1] <= end:
                            first, last = axis.needed_of(more)
                            assert first < begin or last > end, (case, part)
    assert seen > 20


def test_halo_bytes_by_hand():
    """A row of parts, whose windows reach three tokens to each side; and corners."""
    count = functools.partial(natten.distributed.halo_bytes, token_bytes=10)
    line = [count([100], [4], 7, part=[i]) for i in range(4)]
    assert line == [(30, 30), (60, 60), (60, 60), (30, 30)]
    ring = [count([100], [4], 7, part=[i], boundary="circular") for i in range(4)]
    assert ring == [(60, 60)] * 4
    causal = [count([100], [4], 7, part=[i], is_causal=True) for i in range(4)]
    assert causal == [(60, 0), (60, 60), (60, 60), (0, 60)]
    square = count([40, 60], [4, 4], (5, 3), part=[1, 2], boundary="cut")
    assert square == (10 * ((10 + 4) * (15 + 2) - 10 * 15),) * 2
    # Windows that are longer than parts reach several of them.
    assert count([16], [8], 9, part=[3], boundary="cut") == (80, 80)
    assert count([7], [4], 3, part=[3]) == (10, 20)  # of sizes 2, 2, 2, 1
    for bad, match in (
        (dict(part=[4]), r"part: got \[4\]; must be below \[4\]"),
        (dict(part=[0], parts=[4, 4]), r"parts: got .*2 elements; must be 1"),
        (dict(part=[0], token_bytes=-1), r"token_bytes: got -1"),
        (dict(part=[0], kernel_size=101), r"kernel_size"),
    ):
        arguments = dict(grid_size=[100], parts=[4], kernel_size=7, token_bytes=1) | bad
        with pytest.raises(ValueError, match=match):
            natten.distributed.halo_bytes(**arguments)
