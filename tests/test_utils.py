"""natten.utils and natten.types."""

from __future__ import annotations

import logging
from typing import get_args

import pytest
from test_package import run_python

import natten.types
from natten import context, utils


def test_importing_loads_no_framework():
    code = """
import sys, natten.flops, natten.types, natten.utils, natten.utils.log
print(sorted({'torch', 'jax', 'numpy'} & set(sys.modules)))
"""
    assert run_python(code).strip() == "[]"


def test_check_all_args():
    assert utils.check_all_args(1, 7, None, None) == ((7,), (1,), (False,))
    assert utils.check_all_args(2, (3, 5), [1, 2], True) == ((3, 5), (1, 2), (True, True))
    assert utils.check_all_args(3, [3, 5, 7], 2, (True, False, False)) == (
        (3, 5, 7),
        (2, 2, 2),
        (True, False, False),
    )
    assert utils.check_all_args(2, 3, 1, [True, None])[2] == (True, False)


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((2, (3, 3, 3), 1, False), ValueError, r"kernel_size: got \(3, 3, 3\), 3 elements"),
        ((2, 3, [1], False), ValueError, r"dilation: got \[1\], 1 elements"),
        ((1, 3, 1, (True, False)), ValueError, r"is_causal: got \(True, False\), 2 elements"),
        ((0, 3, 1, False), ValueError, "na_dim: got 0; must be 1, 2 or 3"),
        ((4, 3, 1, False), ValueError, "na_dim: got 4"),
        ((2, 2.5, 1, False), TypeError, "kernel_size: got 2.5"),
        ((2, None, 1, False), TypeError, "kernel_size: got None"),
        ((2, 3, (1, "2"), False), TypeError, "dilation: got"),
    ],
)
def test_check_all_args_refuses(args, error, message):
    with pytest.raises(error, match=message):
        utils.check_all_args(*args)


def test_check_all_args_with_a_stride():
    """As NATTEN 0.20 has it, in a module of its own."""
    from natten.utils.checks import check_all_args

    assert natten.utils.checks.check_all_args is check_all_args
    window = (3, 5), (2, 1), (1, 2), (True, False)
    assert check_all_args(2, (3, 5), [2, 1], (1, 2), (True, False)) == window
    assert check_all_args(2, 9, 1, None, False) == ((9, 9), (1, 1), (1, 1), (False, False))
    with pytest.raises(ValueError, match=r"stride: got \[1\], 1 elements"):
        check_all_args(2, 3, [1], 1, False)
    with pytest.raises(ValueError, match="na_dim: got 4"):
        check_all_args(4, 3, 1, 1, False)


def test_get_num_na_weights():
    assert utils.get_num_na_weights((7,)) == 7
    assert utils.get_num_na_weights((3, 5)) == 15
    assert utils.get_num_na_weights([3, 5, 7]) == 105
    with pytest.raises(TypeError, match="kernel_size: got 7; must be a tuple"):
        utils.get_num_na_weights(7)


def test_get_device_cc():
    assert utils.get_device_cc is utils.device.get_device_cc is context.get_device_cc


def test_log(caplog):
    logger = utils.log.get_logger("natten.something")
    assert logger is logging.getLogger("natten.something") and not logger.handlers
    assert utils.log.get_logger() is logging.getLogger("natten")
    with caplog.at_level(logging.INFO, logger="natten"):
        logger.info("heard")
    assert caplog.messages == ["heard"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_types(rank):
    for prefix, scalar in (("Dimension", int), ("CausalArg", bool)):
        alias = getattr(natten.types, f"{prefix}{rank}DTypeOrDed")
        assert get_args(alias) == (scalar, tuple[(scalar,) * rank])
