"""The examples that train, shortened."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SEED = 0

FLAX_DIGITS = f"""
import json, sys
import flax_digits
from digits import data
from digits.config import Config

_, losses = flax_digits.train(data.load(), Config(), seed={SEED}, steps=40)
print(json.dumps({{"losses": losses, "torch": "torch" in sys.modules}}))
"""


@pytest.mark.long
def test_flax_digits():
    for name in ("jax", "flax", "optax", "sklearn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    result = subprocess.run(
        [sys.executable, "-c", FLAX_DIGITS],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    losses = report["losses"]
    assert len(losses) == 40 and np.all(np.isfinite(losses))
    # Guessing among ten digits costs log(10) = 2.3; label smoothing leaves at least 0.5.
    assert np.mean(losses[:5]) > 2
    assert np.mean(losses[-5:]) < 1.6, f"seed {SEED}: {losses}"
    assert not report["torch"]
