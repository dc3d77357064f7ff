"""The examples that train, shortened, and the one that streams."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


WEATHER = f"""
import json
import natten, torch, weather

natten.use_fused_na()
model, losses = weather.train(weather.World.make(1), steps=40, seed={SEED})

# Where the grid is cut open does not matter: turning all of it turns the result.
field = torch.randn(1, weather.LATITUDES, weather.LONGITUDES, 1)
with torch.inference_mode():
    turned = model(field).roll(7, 2)
    model.place.copy_(model.place.roll(7, 1))
    again = model(field.roll(7, 2))
print(json.dumps({{"losses": losses, "difference": (again - turned).abs().max().item()}}))
"""

STREAMING = f"""
import json, streaming

print(json.dumps(streaming.run(frames=11, size=(6, 8), seed={SEED})))
"""


def report_of(program: str, *needed: str) -> Any:
    """What the last line that `program` prints says, as JSON."""
    for name in needed:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
def test_flax_digits():
    report = report_of(FLAX_DIGITS, "jax", "flax", "optax", "sklearn")
    losses = report["losses"]
    assert len(losses) == 40 and np.all(np.isfinite(losses))
    # Guessing among ten digits costs log(10) = 2.3; label smoothing leaves at least 0.5.
    assert np.mean(losses[:5]) > 2
    assert np.mean(losses[-5:]) < 1.6, f"seed {SEED}: {losses}"
    assert not report["torch"]


@pytest.mark.long
def test_weather():
    report = report_of(WEATHER, "torch", "matplotlib")
    losses = report["losses"]
    assert len(losses) == 40 and np.all(np.isfinite(losses))
    assert abs(losses[0] - 1) < 1e-5, "an untrained model says that nothing changes"
    assert np.mean(losses[-3:]) < 0.95, f"seed {SEED}: {losses}"
    assert report["difference"] < 1e-4


def test_streaming():
    assert report_of(STREAMING, "torch") is True
