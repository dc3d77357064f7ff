"""`natten._core` called directly, as adapters of other frameworks would, and called wrongly."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from natten import _core
from natten._args import SEPARATE_KEY_GRID, make_config, with_flags

CONFIG = make_config(1, 3)
SHAPE = (1, 16, 2, 4)
SPEC = (SHAPE, "float32")
FAULTS = (TypeError, ValueError, OverflowError)


def array() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype("float32")


def run(inputs, outputs, allocate=None, config=CONFIG):
    """Fused attention."""
    return _core.run(
        "attention_forward", config, None, "", [*inputs, *[None] * 4], outputs, None, allocate
    )


MALFORMED = [
    (),
    (SHAPE,),
    (*SPEC, 3),
    (1, 2),
    ("float32", SHAPE),
    ((1, "x"), "float32"),
    ((1, 2.5, 2, 4), "float32"),
    (None, "float32"),
    (SHAPE, None),
    (SHAPE, "int8"),
    (SHAPE, b"float32"),
    ((1,) * 9, "float32"),
    ((2**70, 16, 2, 4), "float32"),
    ((2**62, 2**62, 2**62, 4), "float32"),
    ((1, 2**32, 2**32, 1), "float32"),
    ((1, -16, 2, 4), "float32"),
    "float32",
    b"",
    3,
    True,
    {},
    [SHAPE, "float32"],
    object(),
    np.float32(1),
    np.zeros(SHAPE, object),
    np.zeros(SHAPE, "int32"),
]


@pytest.mark.parametrize("malformed", MALFORMED, ids=lambda x: repr(x)[:30].split("\n")[0])
def test_malformed_tensors(malformed):
    good = array()
    for inputs in itertools.permutations((good, good, malformed)):
        with pytest.raises(FAULTS, match=r"^(query|key|value): "):
            run(inputs, [good.copy(), None])
        with pytest.raises(FAULTS, match=r"^(query|key|value): "):
            _core.explain("attention_forward", CONFIG, None, "", [*inputs, *[None] * 4])
    tensors = [good, good, good, *[None] * 4]
    if malformed is True:  # means "wanted"
        with pytest.raises(FAULTS, match=r"^output: "):
            run((good, good, good), [malformed, None])
        return
    for operation in (
        lambda: run((good, good, good), [malformed, None]),
        lambda: run((good, good, good), [malformed, None], np.empty),
        lambda: _core.plan("attention_forward", CONFIG, None, "", tensors, [malformed, None]),
        lambda: _core.run_all(
            "attention_forward", CONFIG, None, "", [(tensors, [malformed, None])]
        ),
    ):
        with pytest.raises(FAULTS, match=r"^output: "):
            operation()


def test_a_spec_has_no_memory():
    good = array()
    with pytest.raises(ValueError, match=r"^query: has no memory"):
        run((SPEC, good, good), [good.copy(), None])
    with pytest.raises(ValueError, match=r"^output: has no memory"):
        run((good, good, good), [SPEC, None])


def test_outputs_must_be_writable():
    good, output = array(), np.zeros(SHAPE, "float32")
    output.flags.writeable = False
    for allocate in (None, np.empty):
        with pytest.raises(ValueError, match=r"^output: got a read-only array"):
            run((good, good, good), [output, None], allocate)
    with pytest.raises(ValueError, match=r"^output: got a read-only array"):
        inputs = [good, good, good, *[None] * 4]
        _core.run_all("attention_forward", CONFIG, None, "", [(inputs, [output, None])])
    assert not output.any()
    good.flags.writeable = False  # inputs may be
    run((good, good, good), [np.empty_like(output), None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_jax_are_no_outputs(dtype):
    jnp = pytest.importorskip("jax.numpy")
    good, output = jnp.ones(SHAPE, dtype), jnp.zeros(SHAPE, dtype)
    with pytest.raises(ValueError, match=r"^output: got a read-only array"):
        run((good, good, good), [output, None])
    assert not output.any()


def test_outputs_must_not_overlap():
    x = array()
    with pytest.raises(ValueError, match=r"^output: shares memory with query"):
        run((x, x.copy(), x.copy()), [x, None])
    for strides in ((0, 0, 0, 4), (0, 32, 0, 4), (0, 32, 8, 4)):
        output = np.lib.stride_tricks.as_strided(np.empty(600, "float32"), SHAPE, strides)
        with pytest.raises(ValueError, match=r"^output: got strides"):
            run((x, x, x), [output, None])
    packed = np.empty((1, 16, 2, 2, 4), "float32")
    packed[:, :, 0] = x
    run((packed[:, :, 0], x, x), [packed[:, :, 1], None])  # interleaved, not overlapping
    assert np.array_equal(packed[:, :, 1], run((x, x, x), [True, None], np.empty)[0])


def test_bias_needs_one_grid():
    config = with_flags(CONFIG, SEPARATE_KEY_GRID)
    x, rpb = array(), np.zeros((2, 31), "float32")
    with pytest.raises(ValueError, match=r"^rpb: .*separate_key_grid"):
        inputs = [x, x, x, rpb, None, None, None]
        _core.run("attention_forward", config, None, "", inputs, [x.copy(), None])
    for op, inputs in (("rpb_gather", [((2, 5), "float32"), None]), ("rpb_scatter", [SPEC, None])):
        with pytest.raises(ValueError, match=r"rpb: .*separate_key_grid"):
            _core.plan(op, config, None, "", inputs, [True])


def test_junk_is_refused():
    """Whatever the arguments are, an exception says so, or it runs."""
    rng = random.Random(0)
    x = array()
    read_only = x.copy()
    read_only.flags.writeable = False
    atoms = [*MALFORMED, None, SPEC, read_only, x[:0], x[..., :1], x[:, ::-1], float("nan")]
    atoms += [-1, 2**31, 2**63, "", "attention_forward", "cuda:1", [[]], list(CONFIG), print]
    operations = ["attention_backward", "qk", "av", "av_transpose", "rpb_gather", "rpb_scatter"]
    operations += ["attention_forward"] * 6

    def some(roles):
        if rng.random() < 0.05:
            return rng.choice(atoms)
        masks = {True: rng.choice((np.ones((1, 16), bool), None)), False: None}
        good = [
            x.copy() if is_required else masks[is_mask] for *_, is_required, _, is_mask in roles
        ]
        return [rng.choice(atoms) if rng.random() < 0.1 else tensor for tensor in good]

    def config():
        part = make_config(1, 3, boundary="cut", query_offset=0, key_offset=-1, grid_size=16)
        whole = make_config(2, (3, 2)), make_config(1, 4, boundary="circular")
        values = list(rng.choice((CONFIG, *whole, part, make_config(1, 1, flags=4))))
        for _ in range(rng.randrange(3)):
            values[rng.randrange(len(values))] = rng.choice((-1, 0, 1, 2, 9, 2**31, 2**63 - 1))
        return values if rng.random() < 0.9 else rng.choice(atoms)

    ran = 0
    for _ in range(2500):
        op = rng.choice(operations) if rng.random() < 0.95 else rng.choice(atoms)
        roles = _core.roles(op) if isinstance(op, str) and op in operations else []
        inputs, outputs = (some([r for r in roles if r[2] == out]) for out in (False, True))
        scale = rng.choice((None, 1.0, 0.5, "x"))
        call = rng.choice(("run", "plan", "explain", "run_all"))
        arguments = [op, config(), scale, rng.choice(("", "naive", "fused", "none"))]
        try:
            if call == "run_all":
                _core.run_all(*arguments, [(inputs, outputs)])
            elif call == "run":
                _core.run(*arguments, inputs, outputs, None, rng.choice((None, np.empty)))
            elif call == "plan":
                _core.plan(*arguments, inputs, outputs, rng.choice(("cpu", "cuda", None)))
            else:
                _core.explain(*arguments, inputs)
            ran += 1
        except Exception as error:
            assert isinstance(error, FAULTS), (call, arguments, inputs)
    assert ran > 50
