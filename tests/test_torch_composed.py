"""The backend made of PyTorch's own operations: numbers, derivatives, transforms and graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import cases  # noqa: E402
import test_torch_random as random_torch  # noqa: E402
import torch_cases as tc  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402

import natten  # noqa: E402
import natten.functional as F  # noqa: E402
from natten import _kernel  # noqa: E402
from natten._args import make_config  # noqa: E402
from natten._composed import tiles_of  # noqa: E402
from natten.torch import _composed  # noqa: E402

COUNT = 150
RANKS_AND_PARTS = [(rank, part) for rank in (1, 2, 3) for part in (False, True)]


@pytest.fixture(autouse=True)
def composed():
    with natten.na_kernel("composed"):
        yield


@pytest.fixture(params=[None, 1000])
def chunks(request, monkeypatch):
    """Sets how many pairs are in memory at a time, so that small problems have several chunks."""
    if request.param:
        for name in ("_PAIRS_ON_CPU", "_PAIRS_ON_CPU_WITH_GRADIENTS", "_PAIRS"):
            monkeypatch.setattr(_composed, name, request.param)


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 2)
def test_fused(drawn, chunks, capsys):
    errors = cases.Errors("composed fused")
    for case in drawn:
        random_torch.check_fused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


@cases.a_tenth_and_the_rest(COUNT, cases.SEED + 3)
def test_unfused(drawn, chunks, capsys):
    errors = cases.Errors("composed unfused")
    for case in drawn:
        random_torch.check_unfused(case, errors)
    with capsys.disabled():
        print(f"\n{errors.table()}")


def small_inputs(rank, part):
    return tc.fused_inputs(rank, dim=2, value_dim=1, part=part)


def close(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("rank", "part"),
    [cases.long_unless(rank == 1 and part, rank, part) for rank, part in RANKS_AND_PARTS],
)
@pytest.mark.parametrize("make", [tc.fused_attention, tc.unfused_attention])
def test_gradients_of_first_and_second_order(rank, part, make):
    torch.manual_seed(rank)
    function, inputs = make(rank, part), small_inputs(rank, part)
    options = {"fast_mode": True, "check_batched_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, **options)
    assert gradgradcheck(function, inputs, **options)


@pytest.mark.parametrize(
    ("rank", "part"), [cases.long_unless(rank == 2, rank, part) for rank, part in RANKS_AND_PARTS]
)
def test_transforms_of_torch_func(rank, part, chunks):
    torch.manual_seed(rank)
    ours, dense = tc.fused_attention(rank, part), tc.dense_attention(rank, part)
    inputs = [x.detach() for x in small_inputs(rank, part)]
    tangents = [torch.randn_like(x) for x in inputs]

    def loss(function):
        return lambda *args: sum(x.sin().sum() for x in function(*args))

    def gradients(function):
        return torch.func.grad(loss(function), argnums=tuple(range(6)))

    close(gradients(ours)(*inputs), gradients(dense)(*inputs))
    for got, want in zip(
        torch.func.jvp(ours, tuple(inputs), tuple(tangents)),
        torch.func.jvp(dense, tuple(inputs), tuple(tangents)),
        strict=True,
    ):
        close(got, want)
    got = torch.func.jvp(gradients(ours), tuple(inputs), tuple(tangents))
    want = torch.func.jvp(gradients(dense), tuple(inputs), tuple(tangents))
    close(got[1], want[1])

    # Each input mapped or not.
    for mapped in ((True,) * 6, (True, False, False, True, False, False), (False, True) * 3):
        dims = tuple(0 if m else None for m in mapped)
        many = [torch.stack([x, 2 * x]) if m else x for x, m in zip(inputs, mapped, strict=True)]
        for function in (lambda f: f, gradients):
            got = torch.func.vmap(function(ours), dims)(*many)
            want = torch.func.vmap(function(dense), dims)(*many)
            close(got, want)


def test_vmap_over_masks():
    torch.manual_seed(0)
    inputs = [x.detach() for x in small_inputs(2, True)]
    masks = torch.stack([tc.key_mask_of(2), ~tc.key_mask_of(2)])
    got = torch.func.vmap(lambda m: tc.fused_attention(2, True)(*inputs, key_mask=m))(masks)
    want = [tc.dense_attention(2, True)(*inputs, key_mask=m) for m in masks]
    close(got, [torch.stack(x) for x in zip(*want, strict=True)])


@pytest.mark.parametrize("mask_batch", [1, 2])
def test_hidden_keys_may_hold_anything(mask_batch, chunks):
    case = cases.Case(
        seed=5, shape=(9, 8), kernel_size=(3, 5), stride=(1, 2), dilation=(2, 1),
        is_causal=(False, True), batch=2, heads=4, kv_heads=2, head_dim=3, value_dim=5,
        dtype="float32", scale=None, rpb=True, additional=0, mask_batch=mask_batch,
    )  # fmt: skip
    arrays = case.fused_arrays()
    hidden = cases.hide(cases.hide(arrays, "key", 1), "value", 1)
    want, got = (random_torch.run_fused(case, x) for x in (arrays, hidden))
    for name in want:
        assert torch.equal(torch.from_numpy(got[name]), torch.from_numpy(want[name])), name
    shown = arrays["key_mask"]
    for name in ("grad_key", "grad_value"):
        assert (got[name][~shown.repeat(2 // mask_batch, 0)] == 0).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_attention(rank):
    """General attention, whose keys may be more or fewer than the queries."""
    torch.manual_seed(rank)
    q, k = torch.randn(2, 5, 4, 3), torch.randn(2, 4 * rank - 2, 2, 3)
    for is_causal in (False, True):
        arguments = [x.double().requires_grad_() for x in (q, k, k.flip(1))]
        got, lse = natten.attention(*arguments, is_causal=is_causal, return_lse=True)
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in arguments), is_causal=is_causal, enable_gqa=True
        ).transpose(1, 2)
        close([got], [want])
        close(*(torch.autograd.grad(x.sin().sum(), arguments) for x in (got, want)))
        reference = natten.attention(
            *arguments, is_causal=is_causal, return_lse=True, backend="naive"
        )
        close([lse], [reference[1]])


def test_biases_of_minus_infinity():
    """A query none of whose scores is finite sees nothing; others do not notice."""
    torch.manual_seed(0)
    q, k, v, rpb, _, _ = small_inputs(2, False)
    with torch.no_grad():
        rpb[0] = -torch.inf
        rpb[1, 0] = -torch.inf
    options = tc.MIXED[2]
    got, want = (
        F.na2d(q, k, v, rpb=rpb, return_lse=True, backend=backend, **options)
        for backend in ("composed", "naive")
    )
    assert (got[0][..., 0, :] == 0).all() and (got[1][..., 0] == -torch.inf).all()
    close(got, want)
    gradients = [torch.autograd.grad(x[0].sum(), (q, k, v, rpb)) for x in (got, want)]
    close(*gradients)


def test_empty_problems():
    empty = torch.randn(0, 4, 4, 2, 3, requires_grad=True)
    output, lse = F.na2d(empty, empty, empty, 3, return_lse=True)
    assert output.shape == empty.shape and lse.shape == empty.shape[:-1]
    output.sum().backward()
    for masks in (0, 1):
        mask = torch.ones(masks, 4, 4, dtype=torch.bool)
        assert F.na2d(empty, empty, empty, 3, key_mask=mask).shape == empty.shape
    none = torch.randn(1, 0, 2, 3)
    assert natten.attention(none, none.new_ones(1, 3, 2, 3), none.new_ones(1, 3, 2, 3)).numel() == 0


def test_autocast_and_half_types():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.na1d(q, k, v, 5)
        want = F.na1d(q, k, v, 5, backend="naive")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def module_of(rank, fused):
    if not fused:
        return tc.MODULES[rank](8, 2, boundary="circular", kernel_size=2)
    window = dict(kernel_size=3, dilation=(2,) + (1,) * (rank - 1), is_causal=True)
    return tc.MODULES[rank](8, 2, rel_pos_bias=True, **window)


# Rank, and whether the module is fused.
MODULES = [(1, True), (1, False), (2, True), (3, False)]


@pytest.mark.parametrize(
    ("rank", "fused"), [cases.long_unless(m == (1, True), *m) for m in MODULES]
)
def test_compile_and_export(rank, fused):
    torch.manual_seed(rank)
    module, x = module_of(rank, fused), torch.randn(2, *(6, 4, 6)[:rank], 8)
    with natten.na_kernel("naive"):
        want = module(x)
        expected = torch.autograd.grad(want.sin().sum(), module.parameters())
    natten.use_fused_na(fused)
    try:
        # The real compiler takes long, and one graph shows what it makes of them.
        backend = "inductor" if fused and rank == 2 else "aot_eager"
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        got = compiled(x)
        torch.testing.assert_close(got, want)
        gradients = torch.autograd.grad(got.sin().sum(), module.parameters())
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
        batch = {0: torch.export.Dim("batch")}
        exported = torch.export.export(module, (x,), dynamic_shapes=({**batch},))
    finally:
        natten.use_fused_na(False)
    assert not [n for n in exported.graph.nodes if "natten" in str(n.target)]
    more = torch.cat([x, x.flip(0), x])
    torch.testing.assert_close(exported.module()(more), module(more))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [tc.fused_attention, tc.unfused_attention])
def test_forward_mode_in_compiled_functions(make, compiler):
    inputs = [x.detach() for x in small_inputs(1, False)]
    tangents = tuple(torch.randn_like(x) for x in inputs)
    attend = make(1, False)

    def energy(*tensors):
        return sum(x.square().sum() for x in torch.utils._pytree.tree_leaves(attend(*tensors)))

    def tangent(*tensors):
        return torch.func.jvp(attend, tensors, tangents)[1]

    def of_gradient(*tensors):
        return torch.func.jvp(torch.func.grad(energy), tensors, tangents)[1]

    def of_tangent(*tensors):
        return torch.func.jvp(tangent, tensors, tangents)[1]

    for differentiated in (tangent, of_gradient, of_tangent):
        torch._dynamo.reset()
        compiled = torch.compile(differentiated, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(*inputs), differentiated(*inputs))


@pytest.mark.parametrize(
    ("rank", "fused"), [cases.long_unless(m == (1, True), *m) for m in MODULES]
)
def test_onnx(rank, fused, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    torch.manual_seed(rank)
    module, x = module_of(rank, fused).eval(), torch.randn(2, *(6, 4, 6)[:rank], 8)
    path = tmp_path / "module.onnx"
    natten.use_fused_na(fused)
    try:
        torch.onnx.export(
            module, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    finally:
        natten.use_fused_na(False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = torch.randn(batch, *x.shape[1:])
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_onnx_of_a_function(tmp_path):
    """Everything that a call can have, but a batch of its own in the mask."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    class Function(torch.nn.Module):
        def forward(self, *args):
            *tensors, mask = args
            return tc.fused_attention(2, True)(*tensors, key_mask=mask)

    torch.manual_seed(0)
    inputs = (*(x.detach().float() for x in small_inputs(2, True)), tc.key_mask_of(2)[:1])
    path = tmp_path / "function.onnx"
    torch.onnx.export(Function().eval(), inputs, path, dynamo=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    want = Function()(*inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-4, atol=1e-5)


def test_meta_tensors():
    inputs = [x.detach().to("meta").requires_grad_() for x in tc.fused_inputs(2)]
    output, lse = tc.fused_attention(2)(*inputs)
    want = tc.fused_attention(2)(*tc.fused_inputs(2))
    assert [x.shape for x in (output, lse)] == [x.shape for x in want]
    assert output.device.type == "meta"
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_memory_does_not_grow_with_the_window():
    """Nothing is kept between the passes but inputs and results; a chunk bounds the rest."""
    q = torch.randn(1, 4096, 1, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        output = F.na1d(q, q, q, 1025)
    assert max(kept) < 4096 * 1025 / 10
    sizes = []
    largest = 2 * _composed._PAIRS_ON_CPU_WITH_GRADIENTS

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result)
                         if isinstance(x, torch.Tensor))  # fmt: skip
            return result

    with Watch():
        output.sum().backward()
    assert max(sizes) <= largest < 4096 * 1025


@pytest.mark.parametrize("backend", ["composed", "fused", None])
def test_devices_without_kernels(backend, caplog, monkeypatch):
    monkeypatch.setattr(_composed, "lacks_kernels", lambda device: device.type == "meta")
    monkeypatch.setattr(_kernel, "_without_kernels", set())
    with natten.na_kernel("fused"):
        q = torch.randn(1, 5, 5, 2, 4, device="meta")
        for _ in range(2):
            assert F.na2d(q, q, q, 3, backend=backend).shape == q.shape
        assert [r.message for r in caplog.records if "no kernels for meta" in r.message]
        assert len(caplog.records) == 1
        with pytest.raises(ValueError, match='got "naive"; must be composed on meta'):
            F.na2d(q, q, q, 3, backend="naive")


@pytest.mark.parametrize("has_cuda", [False, True])
def test_which_devices_lack_kernels(has_cuda, monkeypatch):
    monkeypatch.setattr(_composed, "_HAS_CUDA", has_cuda)
    lacking = [
        d for d in ("cpu", "meta", "cuda", "mps") if _composed.lacks_kernels(torch.device(d))
    ]
    assert lacking == (["mps"] if has_cuda else ["cuda", "mps"])
    # libnatten refuses a backend by name, and says how to build it.
    assert not _composed.serves(SimpleNamespace(device=torch.device("cuda")), "fna")


def test_debug_messages(caplog, monkeypatch):
    monkeypatch.setattr(_composed, "TELLS_CHOICES", True)
    caplog.set_level("DEBUG", "natten")
    q = torch.randn(1, 11, 2, 4)
    for _ in range(2):
        F.na1d(q, q, q, 9)
    assert [r.message for r in caplog.records] == [
        "attention_forward on cpu, float32, query [1, 11, 2, 4], key [1, 11, 2, 4], "
        "value [1, 11, 2, 4], kernel_size [9]: composed runs it"
    ]


def test_explain():
    q = torch.randn(1, 5, 5, 2, 4)
    verdicts = natten.explain(q, q, q, 3).verdicts
    assert {v.backend for v in verdicts if v.chosen} == {"composed"}
    with natten.na_kernel("fused"):
        verdicts = natten.explain(q, q, q, 3).verdicts
    mine = [v for v in verdicts if v.backend == "composed"]
    assert len(mine) == 2 and not any(v.chosen or v.refusal for v in mine)
    assert {v.backend for v in verdicts if v.chosen} == {"vectorized"}


def test_errors_are_those_of_every_backend():
    q = torch.randn(1, 5, 5, 2, 4)
    for arguments, options in (
        ((q, q, q, 7), {}),
        ((q, q[:, 1:], q, 3), {}),
        ((q, q.double(), q, 3), {}),
        ((q.long(),) * 3 + (3,), {}),
        ((q, q, q, 3), dict(scale=float("nan"))),
        ((q, q, q, 3), dict(rpb=torch.randn(2, 4, 5))),
        ((q, q, q, 3), dict(additional_keys=q[:, 0])),
        ((q, q, q, 3), dict(key_mask=torch.ones(1, 5, 5))),
        ((q, q, q, 3), dict(query_offset=1, grid_size=9)),
        ((q, q.to("meta"), q, 3), {}),
        ((q, None, q, 3), {}),
        ((None, q, q, 3), {}),
    ):
        messages = []
        for backend in ("composed", "naive"):
            with pytest.raises((ValueError, TypeError)) as caught:
                F.na2d(*arguments, **options, backend=backend)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    examples = [torch.randn(n, 2, 4, dtype=torch.float64) for n in (5, 7)]
    results = []
    for backend in ("composed", "naive"):
        q = torch.nested.nested_tensor(examples, layout=layout, requires_grad=True)
        output = F.na1d(q, q, q, 3, backend=backend)
        assert output.layout == layout
        parts = list(output.unbind())
        sum(x.square().sum() for x in parts).backward()
        results.append([*parts, *q.grad.unbind()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_tiles_are_not_much_larger_than_their_windows():
    """What is multiplied to what is asked for: within the order that tiles cost at least."""
    for grid, kernel, stride, most in (
        ((3000,), 101, 1, 2),
        ((56, 56), 7, 1, 5),
        ((16, 32, 32), (3, 5, 5), 1, 8),
        ((64, 64), 8, 8, 4),
    ):
        config = make_config(len(grid), kernel, 1, False, stride)
        tiles = tiles_of(config, grid, grid)
        multiplied = tiles.count * tiles.queries_per_tile * tiles.keys_per_tile
        useful = torch.Size(grid).numel() * torch.Size(tiles.kernel_size).numel()
        assert multiplied <= most * useful
