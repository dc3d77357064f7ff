"""The installed package: what it imports, its native module, threads and processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata, resources

import numpy as np
import pytest

import natten
from natten import _args, _core

CONFIG = _args.make_config(2, 3)


def run_python(code: str, **env: str) -> str:
    """The output of a fresh interpreter, which can import the tests' modules."""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,  # rather than hang
    ).stdout


def numpy_forward(dtype=np.float32, shape=(1, 6, 7, 2, 4), backend=""):
    """Fused attention on numpy arrays, straight through the binding."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(dtype) for _ in range(3)]
    for x in inputs:
        x.flags.writeable = False
    output = np.empty(shape, dtype)
    run_inputs = [*inputs, *[None] * 4]
    _core.run("attention_forward", CONFIG, None, backend, run_inputs, [output, None])
    return output


def test_import_loads_no_framework():
    code = "import sys, natten; print(sorted({'torch', 'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_torch_names_load_on_demand():
    code = "import sys, natten; natten.na2d; print('torch' in sys.modules, 'jax' in sys.modules)"
    assert run_python(code).split() == ["True", "False"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
@pytest.mark.parametrize("first", ["natten.functional", "torch._dynamo"])
def test_dynamo_loads_with_the_first_compilation(first):
    """It takes as long to load as PyTorch does; then it knows what it must not look into."""
    code = f"""
import {first}, importlib.util, sys, torch
import natten.functional
if {first!r} == "natten.functional":
    q = torch.randn(1, 6, 2, 4, requires_grad=True)
    natten.NeighborhoodAttention1D(8, 2, 3)(natten.na1d(q, q, q, 3).flatten(2)).sum().backward()
    assert importlib.util.find_spec("torch._dynamo") is not None  # to look for it is no reason
    assert "torch._dynamo" not in sys.modules

def attend(q):
    q = natten.na1d(q, q, q, 3, backend="composed")
    return natten.attention(q, q, q, backend="hopper-fmha")

q = torch.randn(1, 6, 2, 4)
compiled = torch.compile(attend, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(q), attend(q))
assert not [x for x in sys.meta_path if type(x).__module__.startswith("natten")]
"""
    run_python(code)


LAZY = {
    "numpy": ("numpy.na1d", {"torch", "jax"}),
    "jax": ("jax.na1d", {"torch", "flax"}),
    "flax": ("flax.linen.NeighborhoodAttention1D", {"torch"}),
    "torch": ("utils.varlen.generate_varlen_parameters", {"jax"}),
}


@pytest.mark.parametrize("framework", LAZY)
def test_submodules_load_on_demand(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    name, others = LAZY[framework]
    code = f"""
import sys, natten
[getattr(natten, x) for x in dir(natten) if x in ("numpy", "jax", "flax", "utils")]
assert {framework!r} not in sys.modules
natten.{name}
print(*{others} & set(sys.modules))
"""
    assert run_python(code).split() == []


def test_names():
    assert natten.__version__ == metadata.version("natten")
    assert set(natten.__all__) <= set(dir(natten))
    if importlib.util.find_spec("torch"):
        assert all(hasattr(natten, name) for name in natten.__all__)
    with pytest.raises(AttributeError, match="na4d"):
        _ = natten.na4d


def test_typing_files_are_installed():
    files = resources.files("natten")
    assert files.joinpath("py.typed").is_file()
    stub = files.joinpath("_core.pyi")
    if not stub.is_file():
        pytest.skip("the native module was built without its stub")
    assert "def run(" in stub.read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_binding_reads_numpy(dtype):
    assert np.isfinite(numpy_forward(dtype).astype(np.float64)).all()


def test_binding_refuses():
    x = np.zeros((1, 6, 7, 2, 4), np.float32)

    good = (x, x, x, *[None] * 4)
    room = (x.copy(), None)

    def run(inputs=good, outputs=room, op="attention_forward", config=CONFIG):
        _core.run(op, config, None, "", inputs, outputs)

    run()
    with pytest.raises(TypeError, match="key: got dtype int32"):
        run((x, x.astype(np.int32), x, *[None] * 4))
    with pytest.raises(TypeError, match=r"value: got .*list"):
        run((x, x, [1.0], *[None] * 4))
    with pytest.raises(ValueError, match="query: missing"):
        run((None, x, x, *[None] * 4))
    with pytest.raises(ValueError, match="output: missing"):
        run(outputs=(None, None))
    with pytest.raises(ValueError, match="got 2 inputs; must be 7"):
        run((x, x))
    with pytest.raises(ValueError, match="op: got"):
        run(op="nonsense")
    with pytest.raises(ValueError, match="config"):
        run(config=(2, 3))
    with pytest.raises(ValueError, match="output: got shape"):
        run(outputs=(x[:, :3].copy(), None))
    with pytest.raises(ValueError, match="10 dimensions"):
        run((np.zeros((1,) * 10, np.float32), x, x, *[None] * 4))


def test_any_number_of_threads_gives_the_same_bits():
    before = _core.num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            _core.set_num_threads(count)
            results.append(numpy_forward())
        assert all(np.array_equal(results[0], r) for r in results)
        with pytest.raises(ValueError, match="num_threads: got 0"):
            _core.set_num_threads(0)
    finally:
        _core.set_num_threads(before)


def test_thread_count_from_environment():
    code = "from natten import _core; print(_core.num_threads())"
    assert run_python(code, NATTEN_NUM_THREADS="3", OMP_NUM_THREADS="5").strip() == "3"
    assert run_python(code, NATTEN_NUM_THREADS="", OMP_NUM_THREADS="5").strip() == "5"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run_python(code, NATTEN_NUM_THREADS="", OMP_NUM_THREADS="").strip() == str(usable)
    for wrong in ("none", "0", "-1", "1e3", "2 3", "2,3", str(2**31)):
        message = run_python(
            "from natten import _core\ntry: _core.num_threads()\nexcept ValueError as e: print(e)",
            NATTEN_NUM_THREADS=wrong,
        )
        assert message.strip() == f'NATTEN_NUM_THREADS: got "{wrong}"; must be a positive integer'


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_fork():
    """A forked child, such as a data loader's worker, gets threads of its own."""
    code = """
import os, sys
from test_package import numpy_forward
from natten import _core
_core.set_num_threads(2)
want = numpy_forward()
pid = os.fork()
if pid == 0:
    os._exit(0 if (numpy_forward() == want).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    run_python(code)


def test_backend_from_environment():
    code = "from test_package import numpy_forward; numpy_forward()"
    run_python(code, NATTEN_BACKEND="naive")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_python(code, NATTEN_BACKEND="nonsense")
    assert 'backend: got "nonsense"' in failed.value.stderr


def test_explain():
    x = ((1, 6, 7, 2, 4), "float32")
    inputs = [x, x, x, *[None] * 4]
    rows = _core.explain("attention_forward", CONFIG, None, "", inputs)
    assert [name for name, _, _ in rows] == _core.backends("cpu")
    assert sum(chosen for _, _, chosen in rows) == 1
    assert all(not refusal for name, refusal, _ in rows if name == "naive")
    with pytest.raises(ValueError, match="device"):
        _core.backends("tpu")
