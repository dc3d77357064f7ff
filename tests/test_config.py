"""What natten says of itself: `show_config`, and NATTEN_LOG_LEVEL=debug."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

import pytest

import natten
from natten import _core


def run_python(code: str, **env: str) -> tuple[str, str]:
    """What a fresh interpreter writes to stdout and to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,  # rather than hang
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def needs(framework: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"needs {framework}")


def test_says_how_it_was_built():
    config = natten.show_config()
    assert config.version == natten.__version__
    assert config.compiler and config.compiler[-1].isdigit()
    assert config.system.startswith({"linux": "Linux", "darwin": "Darwin"}.get(sys.platform, ""))
    assert bool(config.cuda_compiler) == bool(config.cuda_architectures)
    assert bool(config.cuda_compiler) == bool(config.backends["cuda"])
    assert (config.xla_ffi is not None) == hasattr(_core, "xla_ffi_handlers")


def test_says_what_runs():
    config = natten.show_config()
    assert config.backends == {d: tuple(_core.backends(d)) for d in ("cpu", "cuda")}
    assert config.threads == _core.num_threads()
    assert config.instruction_sets[-1] == "base"
    assert set(config.available_instruction_sets) <= set(config.instruction_sets)
    assert config.instruction_set in config.available_instruction_sets
    assert config.frameworks["numpy"] == metadata.version("numpy")


def test_prints_all_of_it():
    config = natten.show_config()
    text = str(config)
    assert text == repr(config) and text.startswith(f"natten {natten.__version__}\n")
    for value in (config.compiler, config.system, config.python, config.instruction_set, "numpy"):
        assert str(value) in text
    for names in (*config.backends.values(), config.instruction_sets):
        assert (", ".join(names) or "none") in text


def test_imports_no_framework():
    code = """
import sys, natten
print(natten.show_config())
print(sorted({'torch', 'jax', 'jaxlib', 'flax', 'numpy'} & set(sys.modules)))
"""
    assert run_python(code)[0].splitlines()[-1] == "[]"


def test_says_what_the_environment_forces():
    code = "import natten; print(natten.show_config())"
    text = run_python(code, NATTEN_BACKEND="naive", NATTEN_CPU_ISA="base")[0]
    assert "NATTEN_BACKEND=naive, NATTEN_CPU_ISA=base" in text
    assert ["chosen", "base"] in [line.split() for line in text.splitlines()]
    # An instruction set that no processor has is told, and not raised.
    assert "none: NATTEN_CPU_ISA names another" in run_python(code, NATTEN_CPU_ISA="abacus")[0]


NUMPY = """
import numpy as np
import natten.numpy as nn
x = np.ones((1, 6, 7, 2, 4), np.float32)
for _ in range(2):
    nn.na2d(x, x, x, kernel_size=3)
nn.na2d(x, x, x, kernel_size=(3, 5), dilation=(2, 1), is_causal=(False, True))
nn.na2d(x, x, x, kernel_size=3, backend="naive")
"""


def test_tells_each_choice_once():
    stdout, stderr = run_python(NUMPY, NATTEN_LOG_LEVEL="debug")
    assert not stdout
    call = (
        "natten: attention_forward on cpu, float32, query [1, 6, 7, 2, 4], key [1, 6, 7, 2, 4], "
        "value [1, 6, 7, 2, 4], kernel_size "
    )
    options = "[3, 5], dilation [2, 1], is_causal [False, True]"
    assert stderr.splitlines() == [
        call + "[3, 3]: vectorized runs it; naive would run it too",
        call + options + ": vectorized runs it; naive would run it too",
        call + '[3, 3]: naive runs it (asked for: "naive"); vectorized would run it too',
    ]
    assert '(asked for: "naive")' in run_python(
        NUMPY, NATTEN_LOG_LEVEL="DEBUG", NATTEN_BACKEND="naive"
    )[1]  # fmt: skip


def test_tells_borders_masks_and_parts():
    code = """
import numpy as np
import natten.numpy as nn
x = np.ones((1, 6, 2, 4), np.float32)
nn.na1d(x[:, :2], x, x, 3, boundary="cut", key_mask=np.ones((1, 6), bool), query_offset=0)
"""
    stderr = run_python(code, NATTEN_LOG_LEVEL="debug")[1]
    assert (
        "natten: attention_forward on cpu, float32, query [1, 2, 2, 4], key [1, 6, 2, 4], "
        "value [1, 6, 2, 4], key_mask [1, 6], kernel_size [3], boundary ['cut'], query_offset [0]: "
    ) in stderr


def test_tells_why_not():
    code = """
import numpy as np
import natten.numpy as nn
x = np.ones((1, 1, 5000, 4), np.float32)
nn.na1d_qk(x, x, kernel_size=4999)
"""
    stderr = run_python(code, NATTEN_LOG_LEVEL="debug")[1]
    assert ": naive runs it; vectorized does not run it: the window is too large" in stderr


@pytest.mark.parametrize("level", ["", "info"])
def test_is_silent_unless_asked(level):
    assert run_python(NUMPY, NATTEN_LOG_LEVEL=level) == ("", "")


def test_levels_that_do_not_exist_are_told():
    stderr = run_python("import natten", NATTEN_LOG_LEVEL="loud")[1]
    assert "NATTEN_LOG_LEVEL: got 'loud'; must be one of debug, info" in stderr


def test_handlers_of_the_application_go_first():
    code = f"import logging; logging.basicConfig(format='app: %(message)s')\n{NUMPY}"
    lines = run_python(code, NATTEN_LOG_LEVEL="debug")[1].splitlines()
    assert len(lines) == 3 and all(line.startswith("app: attention") for line in lines)


@needs("torch")
def test_tells_choices_in_pytorch():
    code = """
import torch, natten
from natten.functional import na2d_qk
x = torch.ones(1, 6, 7, 2, 4, requires_grad=True)
for _ in range(2):
    natten.na2d(x, x, x, kernel_size=3).sum().backward()
na2d_qk(*2 * [torch.ones(1, 2, 6, 7, 4, requires_grad=True)], kernel_size=3).sum().backward()
n = torch.nested.nested_tensor([torch.ones(6, 7, 2, 4), torch.ones(5, 7, 2, 4)])
natten.na2d(n, n, n, kernel_size=3)
"""
    lines = run_python(code, NATTEN_LOG_LEVEL="debug")[1].splitlines()
    told = [line.split()[1] for line in lines if line.startswith("natten: ")]
    assert told == ["attention_forward", "attention_backward", "qk", "av", "av_transpose",
                    "attention_forward"]  # fmt: skip
    assert "query [1, 5, 7, 2, 4]" in lines[-1]


@needs("jax")
def test_tells_choices_in_jax():
    code = """
import jax, jax.numpy as jnp
import natten.jax as nj
x = jnp.ones((1, 6, 7, 2, 4))
f = jax.jit(jax.grad(lambda x: nj.na2d(x, x, x, kernel_size=3).sum()))
f(x), f(2 * x)
"""
    lines = run_python(code, NATTEN_LOG_LEVEL="debug", JAX_PLATFORMS="cpu")[1].splitlines()
    told = [line.split()[1] for line in lines if line.startswith("natten: ")]
    assert told == ["attention_forward", "attention_backward"]
