"""PyTorch's `attention` on examples of different lengths that lie one after another."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
import oracle  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import natten  # noqa: E402
from natten.utils.varlen import generate_varlen_parameters  # noqa: E402
from natten.varlen import neighborhood_attention_varlen  # noqa: E402

NAMES = ("cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV")


def drawn(rng, longest=9, dtype=torch.float64, grad=True):
    """(query, key, value, lengths of queries, of keys), with some lengths of 0."""
    count = int(rng.integers(1, 7))
    lengths = rng.integers(0, longest + 1, (2, count))
    lengths[rng.random((2, count)) < 0.2] = 0
    kv_heads, group, dim, value_dim = (int(n) for n in rng.integers(1, 5, 4))
    shapes = (kv_heads * group, dim), (kv_heads, dim), (kv_heads, value_dim)
    tokens = lengths.sum(1)[[0, 1, 1]]
    tensors = [
        torch.from_numpy(rng.standard_normal((1, n, *shape))).to(dtype).requires_grad_(grad)
        for n, shape in zip(tokens, shapes, strict=True)
    ]
    return *tensors, *lengths.tolist()


def lengths_of(queries, keys, dtype=torch.int32):
    return {
        "seqlens_Q": torch.tensor(queries, dtype=dtype),
        "seqlens_KV": torch.tensor(keys, dtype=dtype),
    }


def separate(q, k, v, queries, keys, one, causal):
    """(output, logsumexp) by a call of `one` for each example that has keys."""
    outputs, lses = [], []
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    for a, b, c in zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True):
        if b.shape[1]:
            output, lse = one(a, b, c, causal)
        else:
            output = torch.cat([a[..., :0], a.new_zeros(*a.shape[:-1], v.shape[-1])], -1)
            lse = torch.full(a.shape[:-1], -torch.inf, dtype=statistic)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, 1), torch.cat(lses, 1)


def alone(q, k, v, causal):
    return natten.attention(q, k, v, causal, return_lse=True)


def defined(q, k, v, causal):
    """Softmax attention with a mask, from its definition."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def results_and_gradients(function, q, k, v, rng):
    output, lse = function()
    random = [torch.from_numpy(rng.standard_normal(x.shape)).to(x.dtype) for x in (output, lse)]
    finite = lse.isfinite()
    loss = (output * random[0]).sum() + (lse[finite] * random[1][finite]).sum()
    return output, lse, *torch.autograd.grad(loss, (q, k, v), materialize_grads=True)


@pytest.mark.parametrize("count", [20, pytest.param(150, marks=pytest.mark.long)])
def test_definition_and_separate_calls(count):
    rng = np.random.default_rng([cases.SEED, count])
    empty = 0
    for i in range(count):
        dtype = (torch.float64, torch.float32, torch.bfloat16)[i % 3]
        q, k, v, queries, keys = drawn(rng, dtype=dtype)
        causal = bool(i % 2)
        where = f"{queries=} {keys=} {causal=} {dtype} (NATTEN_TEST_SEED={cases.SEED})"
        lengths = lengths_of(queries, keys, (torch.int32, torch.int64)[i % 2])
        seed = int(rng.integers(1 << 30))

        def packed():
            return natten.attention(q, k, v, causal, return_lse=True, **lengths)  # noqa: B023

        def by(one):
            def separately():
                return separate(q, k, v, queries, keys, one, causal)  # noqa: B023

            draws = np.random.default_rng(seed)  # noqa: B023
            return results_and_gradients(separately, q, k, v, draws)  # noqa: B023

        got = results_and_gradients(packed, q, k, v, np.random.default_rng(seed))
        for name, x, want in zip(("output", "lse", "q", "k", "v"), got, by(alone), strict=True):
            assert torch.equal(x, want), f"{name}: {where}"
        if dtype == torch.float64:
            for name, x, want in zip(
                ("output", "lse", "q", "k", "v"), got, by(defined), strict=True
            ):
                torch.testing.assert_close(
                    x,
                    want,
                    rtol=1e-11,
                    atol=1e-12,
                    msg=lambda m: f"{name}: {m} {where}",  # noqa: B023
                )
        empty += any(a and not b for a, b in zip(queries, keys, strict=True))
        assert not got[0][:, ~got[1].isfinite().all(-1)[0]].any(), where
    assert empty


def test_the_oracle():
    """Examples of as many queries as keys are windows of everything."""
    rng = np.random.default_rng(cases.SEED)
    lengths, parts = [7, 1, 5], []
    for n in lengths:
        case = cases.Case(
            seed=1, shape=(n,), kernel_size=(n,), stride=(1,), dilation=(1,), is_causal=(True,),
            batch=1, heads=2, kv_heads=1, head_dim=3, value_dim=2, dtype="float64", scale=None,
            rpb=False, additional=0,
        )  # fmt: skip
        arrays = {
            name: rng.standard_normal((1, n, heads, dim))
            for name, heads, dim in (
                ("query", 2, 3), ("key", 1, 3), ("value", 1, 2), ("grad_output", 2, 2),
            )
        } | {"grad_logsumexp": rng.standard_normal((1, n, 2))}  # fmt: skip
        parts.append((arrays, oracle.fused(case, arrays)))
    q, k, v = (
        torch.from_numpy(np.concatenate([arrays[name] for arrays, _ in parts], 1))
        for name in ("query", "key", "value")
    )
    output, lse = natten.attention(q, k, v, True, return_lse=True, **lengths_of(lengths, lengths))
    for name, got in (("output", output), ("logsumexp", lse)):
        want = np.concatenate([results[name] for _, results in parts], 1)
        assert cases.relative_error(got.numpy(), want) < cases.FORWARD_BOUND["float64"]


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives(causal):
    q, k, v, *_ = drawn(np.random.default_rng(cases.SEED))
    queries, keys = [2, 0, 1, 2], [3, 2, 0, 1]
    q, k, v = (
        torch.randn(1, n, heads, 2, dtype=torch.float64, requires_grad=True)
        for n, heads in ((5, 2), (6, 1), (6, 1))
    )
    lengths = lengths_of(queries, keys)

    def function(*x):
        output, lse = natten.attention(*x, causal, return_lse=True, **lengths)
        return output, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_vmap():
    torch.manual_seed(cases.SEED)
    q, k = torch.randn(3, 1, 7, 2, 4), torch.randn(1, 6, 2, 4)
    lengths = lengths_of([2, 0, 5], [1, 2, 3])

    def one(q, k, queries):
        return natten.attention(q, k, k, seqlens_Q=queries, seqlens_KV=lengths["seqlens_KV"])

    queries = lengths["seqlens_Q"]
    want = torch.stack([one(x, k, queries) for x in q])
    assert torch.equal(torch.func.vmap(one, (0, None, None))(q, k, queries), want)
    many = torch.tensor([[2, 0, 5], [7, 0, 0]])
    want = torch.stack([one(q[0], k, x) for x in many])
    assert torch.equal(torch.func.vmap(one, (None, None, 0))(q[0], k, many), want)
    grad = torch.func.grad(lambda q: one(q, k, queries).square().sum())
    want = torch.stack([grad(x) for x in q])
    assert torch.equal(torch.func.vmap(grad)(q), want)


def test_compiled_for_all_lengths():
    torch.manual_seed(cases.SEED)

    def function(q, k, v, *lengths):
        return natten.attention(q, k, v, True, **dict(zip(NAMES, lengths, strict=True)))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    q, k = (torch.randn(1, n, 2, 4, requires_grad=True) for n in (8, 6))
    for queries, keys in (([2, 0, 6], [1, 3, 2]), ([5, 3, 0], [2, 4, 0])):
        given = lengths_of(queries, keys).values()
        ends = generate_varlen_parameters(q, k, k, *given)[:2]
        got, want = (f(q, k, k, *ends, 8, 6) for f in (compiled, function))
        assert torch.equal(got, want)
        grads = (torch.autograd.grad(x.square().sum(), (q, k)) for x in (got, want))
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match="generate_varlen_parameters"):
        torch.compile(
            lambda q: generate_varlen_parameters(q, q, q, *given), fullgraph=True, backend="eager"
        )(q)


def test_parameters():
    q, k = torch.zeros(1, 7, 2, 4), torch.zeros(1, 6, 1, 4)
    for dtype in (torch.int32, torch.int64):
        given = lengths_of([2, 0, 5], [1, 2, 3], dtype).values()
        *ends, longest_q, longest_kv = generate_varlen_parameters(q, k, k, *given)
        assert [x.tolist() for x in ends] == [[0, 2, 2, 7], [0, 1, 3, 6]]
        assert all(x.dtype == dtype for x in ends)
        assert (longest_q, longest_kv) == (5, 3) and type(longest_q) is int
    nothing = generate_varlen_parameters(q, k, k)
    assert nothing == (None, None, 0, 0)
    want = natten.attention(q, k, k)
    assert torch.equal(natten.attention(q, k, k, **dict(zip(NAMES, nothing, strict=True))), want)


def test_all_examples_run_in_one_call(monkeypatch):
    calls = []
    run = natten._core.run
    monkeypatch.setattr(natten._core, "run", lambda *a: (calls.append(a[0]), run(*a))[1])
    q = torch.randn(1, 9, 2, 4, requires_grad=True)
    natten.attention(q, q, q, **lengths_of([4, 0, 5], [4, 0, 5])).sum().backward()
    assert calls == ["attention_forward", "attention_backward"]


def test_flops():
    q = torch.randn(1, 9, 2, 4, requires_grad=True)

    def count(function):
        counter = FlopCounterMode(display=False)
        with counter:
            function().sum().backward()
        return counter.get_total_flops()

    got = count(lambda: natten.attention(q, q, q, **lengths_of([4, 5], [3, 6])))
    want = count(lambda: natten.attention(q[:, :4], q[:, :3], q[:, :3]))
    assert got == want + count(lambda: natten.attention(q[:, :5], q[:, :6], q[:, :6]))


@pytest.mark.parametrize("backend", ["naive", "vectorized", "fused"])
def test_a_backend_takes_empty_examples(backend):
    q = torch.randn(1, 7, 2, 4, requires_grad=True)
    output = natten.attention(q, q, q, backend=backend, **lengths_of([0, 3, 4], [5, 0, 2]))
    output.sum().backward()
    assert not output[:, :3].any() and output[:, 3:].all()


def test_autocast():
    q = torch.randn(1, 7, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = natten.attention(q, q, q, **lengths_of([3, 4], [3, 4]))
    assert output.dtype == torch.bfloat16


Q, K = torch.zeros(1, 7, 2, 4), torch.zeros(1, 6, 2, 4)
GOOD = torch.tensor([2, 5]), torch.tensor([3, 3])
ENDS = torch.tensor([0, 2, 7]), torch.tensor([0, 3, 6])
BAD = [
    ((torch.tensor([2, 4]), GOOD[1]), ValueError, r"cumulative_seqlen_Q: got 6 .* of seqlens_Q"),
    ((GOOD[0], torch.tensor([3, 4])), ValueError, r"got 7 .* must be 6, the number of tokens"),
    ((torch.tensor([9, -2]), GOOD[1]), ValueError, r"got 7 after 9 .* may be negative"),
    ((torch.tensor([2.0, 5.0]), GOOD[1]), TypeError, r"^seqlens_Q: got dtype torch.float32"),
    ((GOOD[0], GOOD[1].short()), TypeError, r"^seqlens_KV: got dtype torch.int16"),
    ((GOOD[0][None], GOOD[1]), ValueError, r"^seqlens_Q: got shape \[1, 2\]; must be \[examples\]"),
    ((GOOD[0][:0], GOOD[1]), ValueError, r"^seqlens_Q: got shape \[0\]"),
    ((GOOD[0], torch.tensor([6])), ValueError, r"^seqlens_KV: got 1 numbers; must be 2"),
    ((GOOD[0], None), ValueError, r"^seqlens_KV: missing"),
    ((None, GOOD[1]), ValueError, r"^seqlens_Q: missing"),
    (([2, 5], GOOD[1]), TypeError, r"^seqlens_Q: got list; must be a torch.Tensor"),
    ((GOOD[0].to("meta"), GOOD[1]), ValueError, r"^seqlens_Q: is on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "kind", "message"), BAD)
def test_bad_lengths(lengths, kind, message):
    for backend in (None, "composed"):
        with pytest.raises(kind, match=message):
            natten.attention(Q, K, K, seqlens_Q=lengths[0], seqlens_KV=lengths[1], backend=backend)
    with pytest.raises(kind, match=message):
        generate_varlen_parameters(Q, K, K, *lengths)


@pytest.mark.parametrize(
    ("lengths", "kind", "message"),
    [
        ((torch.tensor([1, 2, 7]), ENDS[1]), ValueError, "got 1 as its first number; must be 0"),
        ((torch.tensor([0, 8, 7]), ENDS[1]), ValueError, "got 7 after 8 for example 1"),
        ((ENDS[0], torch.tensor([0, 6])), ValueError, "cumulative_seqlen_KV: got 2 numbers"),
        ((torch.tensor([7]), torch.tensor([6])), ValueError, "cumulative_seqlen_Q: got 1 numbers"),
        ((ENDS[0], None), ValueError, "^cumulative_seqlen_KV: missing"),
        (
            (*ENDS, 4, 3),
            ValueError,
            "^max_seqlen_Q: got 4; must be at least 5, .* cumulative_seqlen_Q",
        ),
        ((*ENDS, 5, 2), ValueError, "^max_seqlen_KV: got 2; must be at least 3"),
        ((*ENDS, 5.0, 3), TypeError, "^max_seqlen_Q: got 5.0"),
        ((*ENDS, 5, -1), ValueError, "^max_seqlen_KV: got -1"),
        ((None, None, 5, 3), ValueError, "^max_seqlen_Q: got 5 without cumulative_seqlen_Q"),
    ],
)
def test_bad_ends(lengths, kind, message):
    for backend in (None, "composed"):
        with pytest.raises(kind, match=message):
            natten.attention(Q, K, K, **dict(zip(NAMES, lengths, strict=False)), backend=backend)


def test_composed_says_that_it_reads_lengths():
    ends = dict(zip(NAMES, ENDS, strict=False))
    call = functools.partial(natten.attention, backend="composed")
    want = natten.attention(Q, K, K, **ends)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager")(Q, K, K, **ends), want)
    said = "composed reads them, so it must be called outside of the graph"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
        torch.compile(call, fullgraph=True, backend="eager")(Q, K, K, **ends)
    on_meta = [x.to("meta") for x in (Q, K, K)]
    with pytest.raises(RuntimeError, match=said):
        call(*on_meta, **{name: x.to("meta") for name, x in ends.items()})
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (Q, K, K, *ENDS)]
        with pytest.raises(RuntimeError, match=said):
            call(*fake[:3], **dict(zip(NAMES, fake[3:], strict=False)))


def test_other_refusals():
    lengths = dict(zip(("seqlens_Q", "seqlens_KV"), GOOD, strict=True))
    with pytest.raises(ValueError, match="must be the ones or the others"):
        natten.attention(Q, K, K, cumulative_seqlen_Q=ENDS[0], **lengths)
    with pytest.raises(ValueError, match="must be the ones or the others"):
        natten.attention(Q, K, K, max_seqlen_Q=5, **lengths)
    with pytest.raises(ValueError, match=r"^query: got shape \[2, 7, 2, 4\]; with lengths"):
        natten.attention(Q.expand(2, -1, -1, -1), K, K, **lengths)
    with pytest.raises(ValueError, match=r"^value: got shape .*number of keys|^value: got shape"):
        natten.attention(Q, K, K[:, :5], **lengths)
    with pytest.raises(ValueError, match="number of keys must be at least 1"):
        natten.attention(Q, K[:, :0], K[:, :0])


@pytest.mark.parametrize("causal", [False, True])
def test_composed(causal):
    rng = np.random.default_rng(cases.SEED + 11)
    for _ in range(5):
        *tensors, queries, keys = drawn(rng)
        got, want = (
            results_and_gradients(
                lambda b=backend, x=tensors, n=(queries, keys): natten.attention(
                    *x, causal, return_lse=True, backend=b, **lengths_of(*n)
                ),
                *tensors,
                np.random.default_rng(1),
            )
            for backend in ("composed", None)
        )
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


# Grids of different shapes: natten.varlen.


def drawn_grids(rng, rank):
    """(shapes, the options of na{rank}d for each), some of them alike and next to each other."""
    shapes, options = [], []
    for _ in range(int(rng.integers(1, 5))):
        shape = tuple(int(n) for n in rng.integers(1, 8, rank))
        kernel = tuple(int(rng.integers(1, n + 1)) for n in shape)
        dilation = tuple(
            int(rng.integers(1, n // k + 1)) for n, k in zip(shape, kernel, strict=True)
        )
        stride = tuple(int(rng.integers(1, k + 1)) for k in kernel)
        times = int(rng.integers(1, 4))
        shapes += [shape] * times
        options += [{"kernel_size": kernel, "stride": stride, "dilation": dilation}] * times
    return shapes, options


def lists_of(options):
    names = "kernel_size", "stride", "dilation"
    return {f"{name}_list": [o[name] for o in options] for name in names}


def grid_by_grid(query, key, value, shapes, options, causal):
    """(output, logsumexp) by a call for each grid; 0 and -inf for tokens after the last."""
    lengths = [int(np.prod(shape)) for shape in shapes]
    rest = query.shape[1] - sum(lengths)
    results = []
    columns = (x.split([*lengths, rest], 1)[:-1] for x in (query, key, value))
    for shape, option, *parts in zip(shapes, options, *columns, strict=True):
        function = (natten.na1d, natten.na2d, natten.na3d)[len(shape) - 1]
        grids = (x.unflatten(1, shape) for x in parts)
        pair = function(*grids, is_causal=causal, return_lse=True, **option)
        results.append([x.flatten(1, len(shape)) for x in pair])
    output, lse = (torch.cat(x, 1) for x in zip(*results, strict=True))
    pad = torch.nn.functional.pad
    return pad(output, (0, 0, 0, 0, 0, rest)), pad(lse, (0, 0, 0, rest), value=-torch.inf)


def tokens(rng, count, dtype=torch.float64):
    """Query, key and value of that many tokens, of 4 heads that share 2."""
    return [
        torch.from_numpy(rng.standard_normal((1, count, *shape))).to(dtype).requires_grad_()
        for shape in ((4, 6), (2, 6), (2, 3))
    ]


@pytest.mark.parametrize("count", [36, pytest.param(360, marks=pytest.mark.long)])
def test_grids_of_different_shapes(count):
    rng = np.random.default_rng(cases.SEED)
    for i in range(count):
        rank, dtype = 1 + i % 3, (torch.float64, torch.float32, torch.bfloat16)[i // 3 % 3]
        shapes, options = drawn_grids(rng, rank)
        causal = tuple(bool(x) for x in rng.integers(0, 2, rank))
        rest = int(rng.integers(0, 3))
        where = f"{shapes=} {options=} {causal=} {rest=} {dtype} (NATTEN_TEST_SEED={cases.SEED})"
        q, k, v = tokens(rng, sum(int(np.prod(shape)) for shape in shapes) + rest, dtype)
        metadata = natten.varlen.configure_varlen(
            shapes, 6, q.device, dtype, True, 3, is_causal=causal, kernel_size=None, stride=None,
            dilation=None, **lists_of(options),
        )  # fmt: skip
        metadata = pickle.loads(pickle.dumps(metadata))
        seed = int(rng.integers(1 << 30))

        def packed():
            return neighborhood_attention_varlen(q, k, v, metadata, return_lse=True)  # noqa: B023

        def separately():
            return grid_by_grid(q, k, v, shapes, options, causal)  # noqa: B023

        got, want = (
            results_and_gradients(f, q, k, v, np.random.default_rng(seed))
            for f in (packed, separately)
        )
        for name, x, y in zip(("output", "lse", "q", "k", "v"), got, want, strict=True):
            assert torch.equal(x, y), f"{name}: {where}"
        with torch.no_grad():
            for x, y in zip(packed(), want[:2], strict=True):
                assert torch.equal(x, y), where
            from_lists = neighborhood_attention_varlen(
                q, k, v, token_layout_list=shapes, is_causal=causal,
                **lists_of(options),
            )  # fmt: skip
            assert torch.equal(from_lists, want[0]), where


GRIDS = [(4, 5), (4, 5), (3, 6)]


@pytest.fixture
def packed_grids():
    return tokens(np.random.default_rng(cases.SEED), 60)


def test_derivatives_of_grids(packed_grids):
    def call(*tensors):
        return neighborhood_attention_varlen(
            *tensors, token_layout_list=GRIDS, kernel_size=3, return_lse=True
        )

    def finite(*tensors):
        output, lse = call(*tensors)
        return output, lse[:, :58]

    few = [x[..., :2, :2].detach()[:, :, : 1 + (i == 0)] for i, x in enumerate(packed_grids)]
    few = [x.requires_grad_() for x in few]
    assert torch.autograd.gradcheck(finite, few, fast_mode=True)
    assert torch.autograd.gradgradcheck(finite, few, fast_mode=True)
    q, k, v = packed_grids
    mapped = torch.func.vmap(lambda q: call(q, k, v)[0])(torch.stack([q, 2 * q]))
    assert torch.equal(mapped[1], call(2 * q, k, v)[0])


def test_grids_elsewhere(packed_grids):
    """Other ways through PyTorch give what the plain one does."""
    q, k, v = (x.detach() for x in packed_grids)
    metadata = natten.varlen.configure_varlen(GRIDS, 6, "cpu", q.dtype, False, 3, kernel_size=3)
    want = neighborhood_attention_varlen(q, k, v, metadata, return_lse=True)
    composed = neighborhood_attention_varlen(q, k, v, metadata, backend="composed", return_lse=True)
    for x, y in zip(composed, want, strict=True):
        torch.testing.assert_close(x, y)
    on_meta = (x.to("meta") for x in (q, k, v))
    for x, y in zip(
        neighborhood_attention_varlen(*on_meta, metadata, return_lse=True), want, strict=True
    ):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.is_meta
    with torch.autocast("cpu", torch.bfloat16):
        low = neighborhood_attention_varlen(q.float(), k.float(), v.float(), metadata)
        assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        neighborhood_attention_varlen(q * 6**-0.5, k, v, metadata, scale=1), want[0]
    )
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(neighborhood_attention_varlen(*strided, metadata), want[0])
    with FlopCounterMode(display=False) as counter:
        neighborhood_attention_varlen(q, k, v, metadata)
    assert counter.get_total_flops() == 2 * 58 * 4 * 9 * (6 + 3)


@pytest.mark.parametrize("has_metadata", [True, False])
def test_grids_compiled(packed_grids, has_metadata):
    q, k, v = packed_grids
    metadata = natten.varlen.configure_varlen(GRIDS, 6, "cpu", q.dtype, True, 3, kernel_size=3)
    which = (
        {"metadata": metadata} if has_metadata else {"token_layout_list": GRIDS, "kernel_size": 3}
    )

    def call(q):
        return neighborhood_attention_varlen(q, k, v, **which)

    want = call(q)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(compiled, want)
    a, b = (torch.autograd.grad(x.square().sum(), q)[0] for x in (compiled, want))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "metadata, token_layout_list: got None for both"),
        ({"metadata": {"backend": ""}}, TypeError, "what natten.varlen.configure_varlen returns"),
        ({"token_layout_list": 5}, TypeError, "must be a list of shapes"),
        ({"token_layout_list": []}, ValueError, "with at least one"),
        ({"token_layout_list": (4, 5)}, TypeError, "has 4; must be a list of shapes"),
        ({"token_layout_list": [(4, 5), (3,)]}, ValueError, "equally many"),
        ({"token_layout_list": [(4, 5), (3, 1.5)]}, TypeError, "must be an integer"),
        (
            {"token_layout_list": [(4, 5), (2, 5)], "kernel_size": 3},
            ValueError,
            r"token_layout_list\[1\], \(2, 5\): kernel_size: got \[3, 3\]",
        ),
        ({"token_layout_list": [(40, 5)]}, ValueError, "60 tokens; must be at least 200"),
        (
            {"token_layout_list": GRIDS, "kernel_size_list": [3]},
            ValueError,
            "kernel_size_list: got 1 elements; must be 3",
        ),
        (
            {"token_layout_list": GRIDS, "kernel_size": None},
            ValueError,
            "kernel_size, kernel_size_list: got None for both",
        ),
        ({"token_layout_list": GRIDS, "backend": "fast"}, ValueError, "backend: got .fast"),
        ({"token_layout_list": GRIDS, "window": 3}, TypeError, "unexpected keyword"),
    ],
)
def test_errors_of_grids(packed_grids, options, error, message):
    with pytest.raises(error, match=message):
        neighborhood_attention_varlen(*packed_grids, **options)


def test_errors_of_metadata(packed_grids):
    q, k, v = packed_grids
    metadata = natten.varlen.configure_varlen(GRIDS, 6, "cpu", q.dtype, True, 3, backend="naive")
    with pytest.raises(ValueError, match="stride_list: given together with metadata"):
        neighborhood_attention_varlen(q, k, v, metadata, stride_list=[1, 1, 1])
    with pytest.raises(ValueError, match=r"backend: got 'vectorized'; must be 'naive'"):
        neighborhood_attention_varlen(q, k, v, metadata, backend="vectorized")
    with pytest.raises(ValueError, match="key: got 59 tokens; must be 60"):
        neighborhood_attention_varlen(q, k[:, 1:], v, metadata)
    with pytest.raises(ValueError, match=r"value: got shape \[60, 2, 3\]"):
        neighborhood_attention_varlen(q, k, v[0], metadata)
    with pytest.raises(TypeError, match="dtype int32"):
        natten.varlen.configure_varlen(GRIDS, 6, "cpu", torch.int32, True)
