"""Which backend runs a PyTorch call: the `backend` argument, `na_kernel` and `explain`."""

from __future__ import annotations

import threading

import pytest
from test_package import run_python

torch = pytest.importorskip("torch")

import natten  # noqa: E402
import natten.functional as F  # noqa: E402

ROOM = 5000  # more slots than the vectorized unfused operations take


@pytest.fixture
def called(monkeypatch):
    """(operation, backend asked for) of every call that runs."""
    calls = []
    run = natten._core.run

    def recorded(op, config, scale, backend, *args):
        results = run(op, config, scale, backend, *args)
        calls.append((op, backend))
        return results

    monkeypatch.setattr(natten._core, "run", recorded)
    return calls


def query(length=6, **kwargs):
    return torch.randn(1, length, 2, 4, **kwargs)


def test_blocks_nest_and_end(called):
    q = query()
    with natten.na_kernel("naive"):
        F.na1d(q, q, q, 3)
        with natten.na_kernel("fused"):
            F.na1d(q, q, q, 3)
            F.na1d(q, q, q, 3, backend="vectorized")
        F.na1d_qk(*[q.transpose(1, 2)] * 2, 3)
        with pytest.raises(ValueError, match="kernel_size"):
            F.na1d(q, q, q, 7)
    F.na1d(q, q, q, 3)
    natten.attention(q, q, q)
    assert called == [
        ("attention_forward", "naive"),
        ("attention_forward", "fused"),
        ("attention_forward", "vectorized"),
        ("qk", "naive"),
        ("attention_forward", ""),
        ("attention_forward", ""),
    ]


def test_one_block_object_can_nest_in_itself(called):
    block, q = natten.na_kernel("naive"), query()
    with block, natten.na_kernel("vectorized"), block:
        F.na1d(q, q, q, 3)
    F.na1d(q, q, q, 3)
    assert [backend for _, backend in called] == ["naive", ""]


def test_one_block_object_in_several_threads(called):
    block, q = natten.na_kernel("naive"), query()
    is_inside, may_leave = threading.Event(), threading.Event()

    def other():
        with natten.na_kernel("vectorized"):
            with block:
                is_inside.set()
                assert may_leave.wait(60)
            F.na1d(q, q, q, 3)

    thread = threading.Thread(target=other)
    thread.start()
    assert is_inside.wait(60)
    with block:
        may_leave.set()
        thread.join()
    F.na1d(q, q, q, 3)
    assert [backend for _, backend in called] == ["vectorized", ""]


def test_as_a_decorator(called):
    @natten.na_kernel("naive")
    def attend(q, depth):
        """What it says."""
        return attend(q, depth - 1) if depth else F.na1d(q, q, q, 3)

    q = query()
    attend(q, 2)
    F.na1d(q, q, q, 3)
    assert [backend for _, backend in called] == ["naive", ""]
    assert (attend.__name__, attend.__doc__) == ("attend", "What it says.")
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, 0), attend(q, 0))


def test_a_block_ends_with_an_exception(called):
    q = query()
    with pytest.raises(KeyError), natten.na_kernel("naive"):
        raise KeyError
    F.na1d(q, q, q, 3)
    assert called == [("attention_forward", "")]


def test_other_threads_are_not_affected(called):
    q = query()
    with natten.na_kernel("naive"):
        thread = threading.Thread(target=lambda: F.na1d(q, q, q, 3))
        thread.start()
        thread.join()
    assert called == [("attention_forward", "")]


def test_backward_uses_what_its_forward_chose(called):
    q = query(requires_grad=True)
    with natten.na_kernel("naive"):
        fused = F.na1d(q, q, q, 3)
        scores = F.na1d_qk(*[q.transpose(1, 2)] * 2, 3)
    with natten.na_kernel("vectorized"):
        scores.sum().backward()
        (grad,) = torch.autograd.grad(fused.square().sum(), q, create_graph=True)
    assert {backend for _, backend in called} == {"naive"}
    called.clear()
    grad.square().sum().backward()
    assert {backend for _, backend in called} == {"naive"}


def test_results_agree():
    q = query(dtype=torch.float64)
    results = []
    for name in ("naive", "fused", "vectorized"):
        with natten.na_kernel(name):
            results.append(F.na1d(q, q, q, 3))
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_unknown_names():
    with pytest.raises(ValueError, match=r'backend: got "cuda13"; must be one of .*naive'):
        natten.na_kernel("cuda13")
    q = query()
    names = "composed, fused, naive, vectorized for tensors on cpu"
    for call in (
        lambda **given: F.na1d(q, q, q, 3, **given),
        lambda **given: F.na1d_av(q, q, 3, **given),
        lambda **given: natten.attention(q, q, q, **given),
        lambda **given: natten.explain(q, q, q, 3, **given),
    ):
        with pytest.raises(ValueError) as raised:
            call(backend="cuda13")
        assert str(raised.value) == f'backend: got "cuda13"; must be one of {names}'
    compiled = torch.compile(lambda q: F.na1d(q, q, q, 3, backend="cuda13"), backend="eager")
    with pytest.raises(Exception, match=names):
        compiled(q)


def test_an_unknown_name_in_the_environment():
    code = """
import torch, natten
q = torch.randn(1, 6, 2, 4)
try:
    natten.na1d(q, q, q, 3)
except ValueError as error:
    print(error)
"""
    message = 'backend: got "cuda13" from the environment variable NATTEN_BACKEND; must be one of'
    assert run_python(code, NATTEN_BACKEND="cuda13").startswith(message)


def test_composed_in_the_environment_after_import():
    code = """
import os, torch, natten
os.environ["NATTEN_BACKEND"] = "composed"
q = torch.randn(1, 6, 2, 4)
try:
    natten.na1d(q, q, q, 3)
except ValueError as error:
    print(error)
with natten.na_kernel("composed"):
    print(natten.na1d(q, q, q, 3).shape == q.shape)
"""
    error, works = run_python(code).splitlines()
    assert error.startswith('backend: got "composed" from the environment variable NATTEN_BACKEND')
    assert "before natten is imported" in error
    assert works == "True"


@pytest.mark.parametrize("name", ["vectorized", "fused"])
def test_a_backend_that_refuses_says_why(name):
    x = torch.randn(1, 1, ROOM, 2)
    with (
        natten.na_kernel(name),
        pytest.raises(ValueError, match="vectorized: the window is too large"),
    ):
        F.na1d_qk(x, x, ROOM - 1)
    assert F.na1d_qk(x[:, :, :9], x[:, :, :9], 3).isfinite().all()


def test_fused_from_environment():
    code = """
import torch, natten
q = torch.randn(1, 6, 2, 4)
print(*(v.backend for v in natten.explain(q, q, q, 3).verdicts if v.chosen))
"""
    assert run_python(code, NATTEN_BACKEND="fused").split() == ["vectorized"] * 2
    assert run_python(code, NATTEN_BACKEND="naive").split() == ["naive"] * 2
    assert run_python(code, NATTEN_BACKEND="composed").split() == ["composed"] * 2


def test_explain():
    q = query()
    explanation = natten.explain(q, q, q, kernel_size=3, stride=2, is_causal=True)
    rows = [(v.operation, v.backend, v.refusal, v.chosen) for v in explanation.verdicts]
    assert rows == [
        ("forward", "vectorized", "", True),
        ("forward", "naive", "", False),
        ("forward", "composed", "", False),
        ("backward", "vectorized", "", True),
        ("backward", "naive", "", False),
        ("backward", "composed", "", False),
    ]
    with natten.na_kernel("naive"):
        chosen = [v.backend for v in natten.explain(q, q, q, 3).verdicts if v.chosen]
    assert chosen == ["naive", "naive"]
    assert str(explanation).splitlines()[1].split() == ["forward", "vectorized", "chosen"]


def test_explain_takes_everything():
    q, extra = query(), torch.randn(1, 5000, 2, 4)
    explanation = natten.explain(
        q,
        q,
        q,
        3,
        is_causal=True,
        rpb=torch.randn(2, 5),
        scale=0.5,
        additional_keys=extra,
        additional_values=extra,
        q_tile_shape=4,
    )
    assert [v.backend for v in explanation.verdicts if v.chosen] == ["vectorized", "vectorized"]
    with pytest.raises(ValueError, match=r"^kernel_size: "):
        natten.explain(q, q, q, 7)
    with pytest.raises(ValueError, match=r'^backend: got "abc"'):
        natten.explain(q, q, q, 3, backend="abc")
    with pytest.raises(ValueError, match=r"^q_tile_shape: "):
        natten.explain(q, q, q, 3, q_tile_shape=0)
    nowhere = q.to("meta")
    with pytest.raises(ValueError, match=r"^query: is on meta, .*; must be on the device"):
        natten.explain(nowhere, nowhere, nowhere, 3)


def choices(function, *args, **kwargs):
    """(pass, backend) of what runs, of a call that is explained."""
    rows = natten.explain_call(function, *args, **kwargs).verdicts
    return [(v.operation, v.backend) for v in rows if v.chosen]


def module_and_input(**options):
    module = natten.NeighborhoodAttention1D(8, 2, 3, **options)
    return module, torch.randn(2, 6, 8)


DERIVATIVES = {
    "qk": ["av", "av_transpose"],
    "av": ["qk", "av_transpose"],
}


@pytest.mark.parametrize("backend", ["vectorized", "naive"])
@pytest.mark.parametrize("op", DERIVATIVES)
def test_explain_call_of_unfused_functions(op, backend, called):
    """It says what runs, in the order in which it runs."""
    x = query().movedim(-2, 1)
    function = getattr(F, f"na1d_{op}")
    inputs = [x if op == "qk" else torch.rand(1, 2, 6, 3), x]
    expected = [(op, backend), *((f"backward {name}", backend) for name in DERIVATIVES[op])]
    assert choices(function, *inputs, 3, backend=backend) == expected
    assert called == []
    inputs = [x.requires_grad_() for x in inputs]
    function(*inputs, 3, backend=backend).sum().backward()
    assert called == [(op, backend), *((name, backend) for name in DERIVATIVES[op])]


def test_explain_call_of_fused_functions():
    q = query()
    explained = natten.explain(q, q, q, 3, stride=2, dilation=2).verdicts
    assert natten.explain_call(F.na1d, q, q, q, 3, stride=2, dilation=2).verdicts == explained
    fused = [("forward", "vectorized"), ("backward", "vectorized")]
    assert choices(natten.attention, q, q, q) == fused
    gradient = torch.func.grad(lambda q: F.na1d(q, q, q, 3).sum())
    assert choices(gradient, q)[:2] == fused
    lengths = torch.tensor([2, 4])
    assert choices(natten.attention, q, q, q, seqlens_Q=lengths, seqlens_KV=lengths) == fused


def test_explain_call_of_modules(called):
    module, x = module_and_input(rel_pos_bias=True)
    model = torch.nn.Sequential(module, torch.nn.BatchNorm1d(6), module)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fused in (False, True):
        natten.use_fused_na(fused)
        try:
            passes = {name for name, _ in choices(model, x)}
        finally:
            natten.use_fused_na(False)
        unfused = {"qk", "av"} | {f"backward {x}" for x in ("qk", "av", "av_transpose")}
        assert passes == ({"forward", "backward"} if fused else {*unfused, "backward rpb_scatter"})
    assert called == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    with natten.na_kernel("composed"):
        explanation = natten.explain_call(module, x)
    assert [(v.operation, v.backend) for v in explanation.verdicts if v.chosen] == [
        ("qk", "composed"), ("av", "composed"),
    ]  # fmt: skip
    assert "PyTorch's own" in explanation.note


def test_explain_call_says_why_not():
    x = torch.randn(1, 1, ROOM, 2)
    rows = natten.explain_call(F.na1d_qk, x, x, ROOM - 1, backend="vectorized").verdicts
    refusals = {v.refusal for v in rows if v.backend == "vectorized"}
    assert len(refusals) == 1 and "the window is too large" in refusals.pop()
    assert not any(v.chosen for v in rows)
    assert ("qk", "naive") in choices(F.na1d_qk, x, x, ROOM - 1)


def test_explain_call_with_the_tuner():
    module, x = module_and_input()
    natten.use_fused_na(True)
    natten.use_autotuner(True, True)
    try:
        verdicts = natten.explain_call(module, x).verdicts
    finally:
        natten.disable_autotuner()
        natten.use_fused_na(False)
    assert [v.origin for v in verdicts if v.chosen] == ["default", "default"]


def test_explain_call_refuses():
    q = query()
    with pytest.raises(ValueError, match=r"^function: calls none of natten's operations"):
        natten.explain_call(torch.add, q, q)
    nested = torch.nested.nested_tensor([q[0]])
    with pytest.raises(ValueError, match=r"^function: called with a nested tensor"):
        natten.explain_call(F.na1d, nested, nested, nested, 3)
    with pytest.raises(ValueError, match=r"^kernel_size: "):
        natten.explain_call(F.na1d, q, q, q, 7)
    with pytest.raises(ValueError, match=r'^backend: got "abc"'):
        natten.explain_call(F.na1d, q, q, q, 3, backend="abc")
    weights, nowhere = (x.to("meta") for x in (torch.ones(1, 2, 5, 3), torch.ones(1, 2, 5, 4)))
    with pytest.raises(ValueError, match=r"^attn: is on meta, .*; must be on the device"):
        natten.explain_call(F.na1d_av, weights, nowhere, 3)
