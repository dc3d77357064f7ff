"""PyTorch functions on a CUDA device: the random problems of the CPU's tests against the same
oracle, and what is particular to devices."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import natten  # noqa: E402

if not (natten.has_cuda() and torch.cuda.is_available()):
    pytest.skip("needs a CUDA device, and a build with kernels for it", allow_module_level=True)

import cases  # noqa: E402
import test_torch_random  # noqa: E402
from test_torch_random import check_fused, check_unfused  # noqa: E402
from torch_cases import FUSED, GRIDS, MIXED, MODULES, fused_attention, fused_inputs  # noqa: E402

import natten.functional as F  # noqa: E402

COUNT = 400
RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    monkeypatch.setattr(test_torch_random, "DEVICE", "cuda")
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    natten.use_fused_na(False)
    torch.cuda.synchronize()  # what went wrong in a test shows in it


def tensors(*shape, count=3, dtype=torch.float16, **options):
    return [torch.randn(*shape, dtype=dtype, device="cuda", **options) for _ in range(count)]


def leaves(inputs):
    return [x.detach().requires_grad_() for x in inputs]


def gradients(function, inputs):
    """Results and gradients."""
    inputs = leaves(inputs)
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    return results, torch.autograd.grad(sum(x.sin().sum() for x in results), inputs)


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def relative_error(got, want):
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm())


# ---- results ----


@pytest.mark.parametrize("backend", ["", "simt"])
def test_fused(backend, monkeypatch, capsys):
    monkeypatch.setenv("NATTEN_BACKEND", backend)
    errors = cases.Errors(f"torch fused on CUDA, backend {backend or 'chosen'}")
    for case in cases.random_cases(COUNT):
        check_fused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@pytest.mark.parametrize("backend", ["", "simt"])
def test_unfused(backend, monkeypatch, capsys):
    monkeypatch.setenv("NATTEN_BACKEND", backend)
    errors = cases.Errors(f"torch unfused on CUDA, backend {backend or 'chosen'}")
    for case in cases.random_cases(COUNT, cases.SEED + 1):
        check_unfused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


def half_cases(count):
    """The random problems with types and head dims that tensor cores take."""
    rng = np.random.default_rng(cases.SEED)
    for case in cases.random_cases(count, cases.SEED + 2):
        dim = int(rng.choice([16, 32, 64, 128]))
        dtype = str(rng.choice(["float16", "bfloat16"]))
        yield dataclasses.replace(case, dtype=dtype, head_dim=dim, value_dim=dim)


def test_fused_on_tensor_cores(capsys):
    errors, chosen = cases.Errors("torch fused on CUDA, head dims of tensor cores"), Counter()
    for case in half_cases(COUNT):
        check_fused(case, errors)
        shape = (case.batch, *case.shape)
        q = torch.empty(*shape, case.heads, case.head_dim, dtype=torch.float16, device="cuda")
        k = q[..., : case.kv_heads, :]
        verdicts = natten.explain(q, k, k, **case.neighborhood).verdicts
        chosen.update((v.operation, v.backend) for v in verdicts if v.chosen)
    with capsys.disabled():
        print(f"\n{errors.table()}\n{dict(chosen)}")
    assert chosen["forward", "fna"] > 0 and chosen["backward", "fna"] > 0


LARGE = [
    ((4000,), dict(kernel_size=1301, is_causal=True)),
    ((4000,), dict(kernel_size=513, stride=64)),
    ((70, 61), dict(kernel_size=(31, 17))),
    ((64, 64), dict(kernel_size=13, dilation=4)),
    ((64, 64), dict(kernel_size=16, stride=16)),
    ((18, 20, 23), dict(kernel_size=(7, 9, 5), is_causal=(True, False, False))),
]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("grid", "neighborhood"), LARGE)
def test_large(grid, neighborhood, dtype):
    """Many tiles; against the CPU's float64 results for the same rounded inputs."""
    rounded = tensors(1, *grid, 4, 64, count=4, dtype=getattr(torch, dtype))
    rounded[1:3] = [x[..., :2, :] for x in rounded[1:3]]  # key-value heads

    def results(inputs, grad):
        inputs = leaves(inputs)
        output = FUSED[len(grid)](*inputs, **neighborhood)
        return output, *torch.autograd.grad(output, inputs, grad)

    got = results(rounded[:3], rounded[3])
    exact = [x.cpu().double() for x in rounded]
    want = results(exact[:3], exact[3])
    bounds = [cases.FORWARD_BOUND[dtype]] + [cases.GRADIENT_BOUND[dtype]] * 3
    for name, g, w, bound in zip(
        ("output", "query", "key", "value"), got, want, bounds, strict=True
    ):
        assert relative_error(g, w) <= bound, name


def test_tf32_is_an_opt_in():
    inputs = tensors(1, 40, 40, 4, 64, dtype=torch.float32)
    exact = gradients(step, [x.double() for x in inputs])

    def errors():
        verdicts = natten.explain(*inputs, kernel_size=5).verdicts
        found = flat(gradients(step, inputs))
        return [v.backend for v in verdicts if v.chosen], [
            relative_error(x, y) for x, y in zip(found, flat(exact), strict=True)
        ]

    backends, plain = errors()
    assert backends == ["simt", "simt"] and max(plain) < 1e-5
    natten.enable_tf32()
    try:
        backends, rounded = errors()
    finally:
        natten.disable_tf32()
    assert backends == ["fna", "fna"]
    assert max(rounded) <= cases.GRADIENT_BOUND["float16"] and min(rounded) > 10 * max(plain)


def test_attention_and_merging():
    q, k, v = tensors(2, 50, 4, 32, dtype=torch.float64)

    def merged(q, k, v):
        parts = [F.attention(q, k[:, i::2], v[:, i::2], return_lse=True) for i in range(2)]
        return F.merge_attentions(*zip(*parts, strict=True))

    def whole(q, k, v):
        return F.attention(q, k, v, return_lse=True)

    torch.testing.assert_close(gradients(merged, [q, k, v]), gradients(whole, [q, k, v]))


@RANKS
@pytest.mark.parametrize("fused", [False, True])
def test_modules(rank, fused):
    natten.use_fused_na(fused)
    module = MODULES[rank](8, 2, MIXED[rank]["kernel_size"], rel_pos_bias=True).double()
    x = torch.randn(2, *GRIDS[rank], 8, dtype=torch.float64)
    want = module(x)
    torch.testing.assert_close(module.cuda()(x.cuda()).cpu(), want)


def launches(function):
    """How many of natten's kernels it has run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum("natten" in e.name for e in profile.events())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_examples_of_different_lengths(dtype):
    """As calls for each, in as many launches as one of them takes, but for that of the lengths."""
    queries, keys = [140, 0, 9, 70], [33, 5, 0, 150]
    q, k, v = (
        torch.randn(1, sum(n), h, 32, dtype=dtype, device="cuda", requires_grad=True)
        for n, h in ((queries, 4), (keys, 2), (keys, 2))
    )
    lengths = {
        name: torch.tensor(n, device="cuda")
        for name, n in (("seqlens_Q", queries), ("seqlens_KV", keys))
    }

    def packed():
        output = F.attention(q, k, v, is_causal=True, **lengths)
        return output, torch.autograd.grad(output.square().sum(), (q, k, v))

    output, gradients = packed()
    parts = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    want = [
        F.attention(*x, is_causal=True) if x[1].shape[1] else torch.zeros_like(x[0]) for x in parts
    ]
    want = torch.cat(want, 1)
    torch.testing.assert_close(output, want)
    torch.testing.assert_close(gradients, torch.autograd.grad(want.square().sum(), (q, k, v)))

    def alone():
        x = (q[:, :140], k[:, :33], v[:, :33])
        return torch.autograd.grad(F.attention(*x, is_causal=True).square().sum(), (q, k, v))

    assert launches(packed) == launches(alone) + 2  # in forward and backward


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested(layout):
    parts = [torch.randn(n, 2, 16, dtype=torch.float16, device="cuda") for n in (14, 9, 132)]
    x = torch.nested.as_nested_tensor(parts, layout=layout).requires_grad_()
    output = F.na1d(x, x, x, 5, is_causal=True)
    leaves = [part[None].requires_grad_() for part in parts]
    want = [F.na1d(part, part, part, 5, is_causal=True) for part in leaves]
    torch.testing.assert_close(list(output.unbind()), [w[0] for w in want])
    loss = sum(part.square().sum() for part in output.unbind())
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.autograd.grad(sum(w.square().sum() for w in want), leaves)
    torch.testing.assert_close(list(gradient.unbind()), [g[0] for g in expected])


def test_grids_of_different_shapes():
    grids, kernels = [(20, 9), (20, 9), (5, 30)], [(5, 3), (5, 3), (3, 7)]
    x = torch.randn(1, 520, 2, 16, dtype=torch.float16, device="cuda", requires_grad=True)
    metadata = natten.varlen.configure_varlen(
        grids, 16, x.device, x.dtype, True, kernel_size_list=kernels
    )

    def packed():
        return natten.varlen.neighborhood_attention_varlen(x, x, x, metadata, return_lse=True)

    parts = [
        F.na2d(*[y.unflatten(1, grid)] * 3, kernel_size=kernel).flatten(1, 2)
        for grid, kernel, y in zip(grids, kernels, x.split([180, 180, 150, 10], 1), strict=False)
    ]
    want = torch.cat([*parts, x.new_zeros(1, 10, 2, 16)], 1)
    output, lse = packed()
    torch.testing.assert_close(output, want)
    with torch.no_grad():
        in_place = packed()
    assert same(in_place, (output, lse)) and lse[:, 510:].isneginf().all()
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (output, want))
    torch.testing.assert_close(*gradients)


def test_second_derivatives():
    inputs = leaves([x.double().cuda() for x in fused_inputs(1)])
    assert torch.autograd.gradgradcheck(lambda *x: fused_attention(1)(*x)[0], inputs)


# ---- streams, graphs, compilers ----


def step(q, k, v):
    return F.na2d(q, k, v, kernel_size=5)


def test_other_streams():
    """Work waits for its stream, and for no other."""
    q, k, v = tensors(2, 30, 30, 4, 32)
    want = gradients(step, [q, k, v])
    inputs = [torch.empty_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles
        for to, x in zip(inputs, (q, k, v), strict=True):
            to.copy_(x)
        got = gradients(step, inputs)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert same(got, want)


def test_threads_have_streams_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    inputs = [tensors(1, 40, 40, 2, 32) for _ in range(8)]
    want = [gradients(step, x) for x in inputs]
    torch.cuda.synchronize()

    def on_a_stream(x):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [gradients(step, x) for _ in range(5)][-1]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(on_a_stream, inputs))
    torch.cuda.synchronize()
    assert same(got, want)


def test_graph():
    """A captured forward and backward pass, replayed on other data."""
    inputs = leaves(tensors(2, 20, 20, 4, 32))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(step, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*inputs)
        results = output, *torch.autograd.grad(output.sin().sum(), inputs)
    for _ in range(2):
        fresh = tensors(2, 20, 20, 4, 32)
        with torch.no_grad():
            for x, y in zip(inputs, fresh, strict=True):
                x.copy_(y)
        graph.replay()
        (want,), grads = gradients(step, fresh)
        assert same(results, (want, *grads))


@RANKS
def test_compiled(rank):
    inputs = [x.cuda() for x in fused_inputs(rank)]
    function = fused_attention(rank)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(function, inputs))


def test_compiled_with_graphs():
    inputs = tensors(2, 20, 20, 4, 32)
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(*inputs), step(*inputs))


@HALVES
def test_autocast(dtype):
    inputs = tensors(1, 8, 8, 2, 16, dtype=torch.float32)
    with torch.autocast("cuda", dtype=dtype):
        output, lse = F.na2d(*inputs, kernel_size=3, return_lse=True)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(output, F.na2d(*(x.to(dtype) for x in inputs), kernel_size=3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device():
    inputs = tensors(1, 20, 20, 2, 32)
    want = gradients(step, inputs)
    got = gradients(step, [x.to("cuda:1") for x in inputs])
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in flat(got))
    assert same([x.to("cuda:0") for x in flat(got)], flat(want))
    with pytest.raises(ValueError, match="key: is on cuda:1; must be on the device of query"):
        step(inputs[0], inputs[1].to("cuda:1"), inputs[2])


# ---- determinism ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_same_bits_again(dtype):
    inputs = tensors(2, 24, 24, 4, 64, dtype=dtype)
    rpb = torch.randn(4, 13, 13, dtype=dtype, device="cuda")

    def function(q, k, v, rpb):
        return F.na2d(q, k, v, kernel_size=7, rpb=rpb, return_lse=True)

    first = gradients(function, [*inputs, rpb])
    assert all(same(gradients(function, [*inputs, rpb]), first) for _ in range(5))


@HALVES
def test_kv_parallelism(dtype):
    inputs = tensors(2, 40, 40, 4, 64, dtype=dtype)
    want = gradients(step, inputs)
    natten.use_kv_parallelism_in_fused_na()
    try:
        got = gradients(step, inputs)
    finally:
        natten.use_kv_parallelism_in_fused_na(False)
    bound = cases.GRADIENT_BOUND[str(dtype).removeprefix("torch.")]
    for g, w in zip(flat(got), flat(want), strict=True):
        assert relative_error(g, w) <= bound


# ---- what is refused, and what is said ----


def test_tile_shapes():
    q, k, v = tensors(1, 20, 20, 2, 32)
    with pytest.raises(ValueError, match=r"q_tile_shape") as refused:
        F.na2d(q, k, v, 5, q_tile_shape=(3, 1))
    assert "[3, 1]" in str(refused.value)
    with pytest.raises(ValueError, match=r"^q_tile_shape: got \[0, 1\]"):
        F.na2d(q, k, v, 5, q_tile_shape=(0, 1))


@RANKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tile_shapes_that_are_listed(rank, dtype):
    """Each shape runs, in one pair at least, and gives what the default gives."""
    x = torch.randn(1, *(20, 9, 8)[:rank], 2, 32, dtype=dtype, device="cuda", requires_grad=True)
    function = getattr(F, f"na{rank}d")

    def results(**tiles):
        output = function(x, x, x, 5, **tiles)
        return output, *torch.autograd.grad(output.square().sum(), x)

    forward = natten.get_configs_for_cutlass_fna(x, x, x)
    backward = natten.get_bwd_configs_for_cutlass_fna(x, x, x)
    assert forward and backward
    bound = 2 * cases.GRADIENT_BOUND[str(dtype).removeprefix("torch.")]  # both are rounded
    want = results()
    for i in range(max(len(forward), len(backward)) if rank == 1 else 12):
        q, kv = forward[i * 7 % len(forward)]
        grad_q, grad_kv = backward[i * 5 % len(backward)]
        got = results(
            q_tile_shape=q, kv_tile_shape=kv,
            backward_q_tile_shape=grad_q, backward_kv_tile_shape=grad_kv,
        )  # fmt: skip
        for g, w in zip(got, want, strict=True):
            assert relative_error(g, w) <= bound
    if rank == 1:
        for q, kv in natten.get_configs_for_cutlass_fmha(x, x, x):
            got = natten.attention(x, x, x, q_tile_size=q, kv_tile_size=kv)
            assert relative_error(got, natten.attention(x, x, x)) <= bound


def test_mixed_devices():
    q, k, v = tensors(1, 20, 20, 2, 32)
    with pytest.raises(ValueError, match="key: is on cpu:0; must be on the device of query, cuda:"):
        step(q, k.cpu(), v)


def test_cpu_backends_are_refused():
    with pytest.raises(ValueError, match="must be one of fna, gemm, simt"):
        F.na2d(*tensors(1, 20, 20, 2, 32), 5, backend="naive")


def test_environment():
    for device in (None, 0, "cuda", "cuda:0", torch.device("cuda")):
        assert natten.has_half(device) and natten.has_bfloat(device) and natten.has_fna(device)
        major, minor = torch.cuda.get_device_capability(device)
        assert natten.context.get_device_cc(device) == 10 * major + minor


def test_the_library_stays_usable():
    inputs = tensors(1, 20, 20, 2, 32)
    assert natten._core.compute_capability(999) == 0
    with pytest.raises(ValueError, match="kernel_size"):
        F.na2d(*inputs, kernel_size=21)
    assert step(*inputs).isfinite().all()
