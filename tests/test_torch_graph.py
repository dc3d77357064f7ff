"""torch.compile, torch.export, fake tensors and what PyTorch asks of registered operators."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch_cases import (  # noqa: E402
    GRIDS,
    MIXED,
    MODULES,
    fused_attention,
    fused_inputs,
    key_mask_of,
    neighborhood_of,
    randn,
    unfused_attention,
)

import natten  # noqa: E402
import natten.functional as F  # noqa: E402
from natten import _args  # noqa: E402
from natten.torch import _ops  # noqa: E402

RANKS = pytest.mark.parametrize("rank", [1, 2, 3])
KINDS = pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
MAKE = pytest.mark.parametrize("make", [fused_attention, unfused_attention])


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    natten.use_fused_na(False)


def gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs)
    total = sum(x.sin().sum() for x in (results if isinstance(results, tuple) else (results,)))
    return results, torch.autograd.grad(total, inputs)


# ---- torch.compile ----


@RANKS
@MAKE
@KINDS
def test_compiled_functions(rank, make, part):
    inputs = fused_inputs(rank, part=part)
    compiled = torch.compile(make(rank, part), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, inputs), gradients(make(rank, part), inputs))


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_training_step(fused):
    """With the real compiler: a model's loss and gradients."""
    natten.use_fused_na(fused)
    model = torch.nn.Sequential(
        MODULES[2](8, 2, 3, rel_pos_bias=True), torch.nn.GELU(), MODULES[2](8, 2, 3, dilation=2)
    )
    x = torch.randn(2, 7, 6, 8)
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = function(x).square().mean()
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_one_compilation_for_all_batch_sizes(fused):
    natten.use_fused_na(fused)
    module = MODULES[1](8, 2, 3, rel_pos_bias=True, is_causal=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for batch in (16, 2, 3, 5, 8):
        x = torch.randn(batch, 9, 8)
        torch.testing.assert_close(gradients(compiled, [x]), gradients(module, [x]))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_dynamic_grid():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q: F.na2d(q, q, q, 3, dilation=2), fullgraph=True, backend=counter, dynamic=True
    )
    for grid in ((7, 8), (6, 9), (12, 10)):
        q = torch.randn(2, *grid, 2, 4)
        torch.testing.assert_close(compiled(q), F.na2d(q, q, q, 3, dilation=2))
    assert counter.frame_count == 1


@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_number_of_keys(causal):
    def attend(q, k):
        return natten.attention(q, k, k, causal)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for length in (7, 12, 3):
        inputs = randn(2, 5, 4, 3), randn(2, length, 2, 3)
        torch.testing.assert_close(gradients(compiled, inputs), gradients(attend, inputs))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_export_with_a_dynamic_number_of_keys():
    class Model(torch.nn.Module):
        def forward(self, q, k):
            return natten.attention(q, k, k)

    q, k = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 2, 3)
    program = torch.export.export(
        Model(), (q, k), dynamic_shapes=({}, {1: torch.export.Dim("keys")})
    )
    for length in (7, 30):
        k = torch.randn(2, length, 2, 3)
        torch.testing.assert_close(program.module()(q, k), natten.attention(q, k, k))


def test_scales_that_are_computed_while_tracing():
    number = np.float64(0.25)

    @torch.compile(fullgraph=True, backend="eager")
    def attend(x, scale, which):
        if which == 0:
            scale = 1 / np.sqrt(x.shape[-1])
        if which == 1:
            scale = number
        return F.na1d(x, x, x, 3, scale=scale)

    x = randn(1, 5, 2, 16)
    for which in range(3):
        torch.testing.assert_close(
            attend(x, 2, which), F.na1d(x, x, x, 3, scale=(0.25, 0.25, 2)[which])
        )


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_module_with_a_mask(fused):
    """With the real compiler."""
    natten.use_fused_na(fused)
    module = MODULES[2](8, 2, 3, rel_pos_bias=True, boundary=("cut", "circular"))
    x = torch.randn(2, 5, 6, 8)
    compiled = torch.compile(module, fullgraph=True)
    for batch in (1, 2):
        mask = torch.rand(batch, 5, 6) < 0.5
        mask[0] = False
        torch.testing.assert_close(
            gradients(lambda x: compiled(x, mask), [x]),  # noqa: B023
            gradients(lambda x: module(x, mask), [x]),  # noqa: B023
        )


def test_one_compilation_for_all_steps_of_a_stream():
    """Offsets are numbers of the graph's, not of its making."""
    keys = torch.randn(1, 30, 2, 4)

    def step(row, keys, i, first):
        return F.na1d(
            row, keys, keys, 5, boundary="cut", query_offset=i, key_offset=first, grid_size=30
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(2, 27):
        call = keys[:, i : i + 1], keys[:, i - 2 : i + 4], i, i - 2
        torch.testing.assert_close(compiled(*call), step(*call))
    assert counter.frame_count <= 3  # of two numbers, and of any


def test_errors_are_raised_while_tracing():
    q = torch.randn(1, 5, 2, 4)
    compiled = torch.compile(lambda q: F.na1d(q, q, q, 7), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="kernel_size: got"):
        compiled(q)


def test_compiled_transforms():
    q = torch.randn(3, 1, 6, 2, 4, dtype=torch.float64)

    def function(q):
        return torch.func.vmap(torch.func.grad(lambda q: F.na1d(q, q, q, 3).sin().sum()))(q)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), function(q))


# ---- the choice of a backend ----


class Called:
    """Which backends the operators were told to use."""

    def __init__(self, monkeypatch):
        self.backends = []
        run = natten._core.run

        def recorded(op, config, scale, backend, *args):
            self.backends.append(backend)
            return run(op, config, scale, backend, *args)

        monkeypatch.setattr(natten._core, "run", recorded)

    def take(self):
        backends, self.backends = self.backends, []
        return backends


def test_na_kernel_under_compile(monkeypatch):
    called = Called(monkeypatch)
    q = randn(1, 6, 2, 4)

    def inside(q):
        with natten.na_kernel("naive"):
            first = F.na1d(q, q, q, 3)
        return first + F.na1d(q, q, q, 3)

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    compiled(q).sum().backward()
    assert called.take() == ["naive", "", "", "naive"]

    outside = torch.compile(lambda q: F.na1d(q, q, q, 3), fullgraph=True, backend="aot_eager")
    outside(q)
    with natten.na_kernel("naive"):
        result = outside(q)
    outside(q)
    assert called.take() == ["", "naive", ""]
    result.sum().backward()
    assert called.take() == ["naive"]


# ---- torch.export ----


@RANKS
@pytest.mark.parametrize("fused", [False, True])
def test_export(rank, fused, tmp_path):
    natten.use_fused_na(fused)
    module = MODULES[rank](8, 2, rel_pos_bias=True, **MIXED[rank]).double()
    x = torch.randn(2, *GRIDS[rank], 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for batch in (2, 5):
        x = torch.randn(batch, *GRIDS[rank], 8, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), module(x))


@MAKE
@KINDS
def test_decomposed_export(make, part):
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return make(2, part)(*inputs)

    inputs = tuple(x.detach() for x in fused_inputs(2, part=part))
    program = torch.export.export(Model(), inputs).run_decompositions()
    torch.testing.assert_close(program.module()(*inputs), make(2, part)(*inputs))


def test_export_of_a_module_with_a_mask(tmp_path):
    module = MODULES[2](8, 2, 3, boundary=("cut", "circular"))
    example = torch.randn(2, 5, 6, 8), torch.rand(2, 5, 6) < 0.5
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for count in (2, 5):
        x, mask = torch.randn(count, 5, 6, 8), torch.rand(count, 5, 6) < 0.5
        torch.testing.assert_close(loaded(x, mask), module(x, mask))


# ---- registered operators ----


def operator_calls():
    """Of the whole of a grid, with no mask, and of a part with one."""
    for part in (False, True):
        config = _args.make_config(2, **neighborhood_of(2, part))
        linear = _args.with_flags(config, _args.EMPTY_SLOTS_ZERO)
        inputs = fused_inputs(2, kv_heads=2, part=part)
        grid, keys = (list(x.shape[1:3]) for x in inputs[:2])
        slots = math.prod(config[1:3]) + 1
        mask = key_mask_of(2) if part else None
        query, key, extra = (inputs[i].detach().movedim(-2, 1) for i in (0, 1, 4))
        query, key = query.requires_grad_(), key.requires_grad_()
        attn, rpb = randn(2, 2, *grid, slots), inputs[3]
        fused = *fused_inputs(2, part=part), mask
        plain = *fused[:3], None, None, None, mask
        output, logsumexp = (x.detach() for x in _ops.attention_forward(*fused, config, None, ""))
        incoming = torch.randn_like(output), torch.randn_like(logsumexp)
        some = [True, False, True, False, False, False]
        yield _ops.attention_forward, (*fused, config, None, "")
        yield _ops.attention_forward, (*plain, _args.with_flags(config, 1), 0.3, "naive")
        yield _ops.attention_backward, (*fused, logsumexp, *incoming, [True] * 6, config, None, "")
        yield _ops.attention_backward, (*plain, logsumexp, output, None, some, config, None, "")
        yield _ops.qk, (query, key, rpb, extra, mask, linear, "")
        yield _ops.qk, (query, key, None, None, mask, linear, "")
        yield _ops.av, (attn, key, extra, mask, config, "")
        without_extra = attn[..., :-1].detach()
        yield _ops.av, (without_extra.requires_grad_(), key, None, mask, config, "")
        yield _ops.av_transpose, (attn, query, mask, keys, 1, config, "")
        yield _ops.av_transpose, (without_extra.detach(), query, mask, keys, 0, config, "")
        yield _ops.rpb_gather, (rpb, mask, 2, grid, 1, linear, "")
        yield _ops.rpb_scatter, (attn, mask, config, "")
    # Examples of different lengths, one after another.
    flags = _args.SEPARATE_KEY_GRID | _args.ALLOW_NO_KEYS
    config = _args.make_config(1, 1, is_causal=True, flags=flags)
    tensors = tuple(randn(1, n, 2, 4) for n in (9, 7, 7))
    inputs = *tensors, None, None, None, None
    packing = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 2, 7, 7]), 5, None
    call = *inputs, *packing, config, None, ""
    output, logsumexp = (x.detach() for x in _ops.packed_attention_forward(*call))
    yield _ops.packed_attention_forward, call
    # Second derivatives go example by example, which a graph of unknown lengths cannot.
    inputs = *(x.detach() for x in tensors), None, None, None, None
    saved = *inputs, logsumexp, torch.randn_like(output), None
    wanted = [True] * 3 + [False] * 3
    yield _ops.packed_attention_backward, (*saved, wanted, *packing, config, None, "")


CALLS = list(operator_calls())


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda i: f"{CALLS[i][0].name}-{i}")
def test_opcheck(number):
    operator, args = CALLS[number]
    result = torch.library.opcheck(operator.overload, args)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("natten::")}  # fmt: skip
    assert registered == {operator.schema_name for operator, _ in CALLS}


@RANKS
@MAKE
@KINDS
def test_fake_tensors(rank, make, part):
    inputs = fused_inputs(rank, part=part)
    function = make(rank, part)
    want = gradients(function, inputs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs]
        more = dict(key_mask=key_mask_of(rank)) if part else {}
        got = gradients(lambda *x: function(*x, **more), fake)
    for g, w in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, want)), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)


def test_operators_appear_in_a_trace():
    """torch.jit.trace is what fvcore counts on."""
    module = MODULES[1](8, 2, 3)
    x = torch.randn(1, 6, 8)
    traced = torch.jit.trace(module, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {"natten::qk", "natten::av"} <= kinds
    torch.testing.assert_close(traced(x), module(x))


def test_script_says_what_to_use_instead():
    def caller(x: torch.Tensor):
        return F.na1d_qk(x, x, 3)

    module = natten.NeighborhoodAttention2D(8, 2, 3)
    for name, target in (
        ("na2d", F.na2d),
        ("na3d_av", F.na3d_av),
        ("attention", natten.attention),
        ("merge_attentions", natten.merge_attentions),
        ("natten2dqkrpb", F.natten2dqkrpb),
        ("na1d_qk", caller),
        ("NeighborhoodAttention2D", module),
        ("NeighborhoodAttention2D", torch.nn.Sequential(torch.nn.Linear(8, 8), module)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{name}: .*; use torch.compile, "):
            torch.jit.script(target)


torch.fx.wrap("wrapped_na1d")


def wrapped_na1d(x):
    return F.na1d(x, x, x, 3)


def test_fx():
    """It may go around, and is told so where it goes inside."""
    for inside in (MODULES[1](8, 2, 3), lambda x: F.na1d(x, x, x, 3), lambda x: F.na1d_qk(x, x, 3)):
        with pytest.raises(TypeError, match=r": got Proxy; .*torch.fx must not trace into natten"):
            torch.fx.symbolic_trace(inside)
    x = torch.randn(1, 6, 2, 4)
    traced = torch.fx.symbolic_trace(lambda x: wrapped_na1d(x) + 1)
    torch.testing.assert_close(traced(x), wrapped_na1d(x) + 1)
