"""Splits one grid over several devices along its spatial axes, and trains on it.

    python examples/sharding_grid.py

Runs on the CPU, of which it makes eight devices: two along the latitude of a field on a sphere,
four along its longitude, which goes on at the other end. On several machines each runs

    python examples/sharding_grid.py --coordinator HOST:PORT --processes COUNT --process NUMBER
"""

from __future__ import annotations

import argparse
import os
import re
import sys

import numpy as np

LATITUDES, LONGITUDES, HEADS, DIM = 32, 64, 2, 8
CHANNELS = HEADS * DIM
WINDOW = {"kernel_size": (5, 7), "boundary": ("cut", "circular")}
STEPS = 5


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="where process 0 listens, HOST:PORT")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--process", type=int, default=0, help="the number of this one")
    arguments = parser.parse_args()
    here = 8 // arguments.processes
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={here}"
    os.environ["XLA_FLAGS"] = flags
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from natten.jax import na2d

    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)

    def model(weights, field):
        """One layer of attention; `field` is [batch, latitudes, longitudes, channels]."""
        qkv = jnp.einsum("byxc,ctd->tbyxd", field, weights["qkv"])
        query, key, value = qkv.reshape(*qkv.shape[:-1], HEADS, DIM)
        mixed = na2d(query, key, value, **WINDOW)
        return field + mixed.reshape(field.shape) @ weights["proj"]

    def loss(weights, before, after):
        return jnp.mean((model(weights, before) - after) ** 2)

    def step(weights, before, after):
        value, gradients = jax.value_and_grad(loss)(weights, before, after)
        return value, jax.tree.map(lambda w, g: w - 2.0 * g, weights, gradients)

    # The field of tomorrow is that of today, further east.
    rng = np.random.default_rng(0)
    before = rng.standard_normal((1, LATITUDES, LONGITUDES, CHANNELS)).astype(np.float32)
    after = np.roll(before, 2, axis=2)
    weights = {
        "qkv": 0.2 * rng.standard_normal((CHANNELS, 3, CHANNELS)).astype(np.float32),
        "proj": 0.2 * rng.standard_normal((CHANNELS, CHANNELS)).astype(np.float32),
    }

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("latitude", "longitude"))

    def placed(x, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    split = [placed(x, None, "latitude", "longitude") for x in (before, after)]
    everywhere = jax.tree.map(placed, weights)
    run = jax.jit(step).lower(everywhere, *split).compile()
    alone = jax.jit(step)
    difference = 0.0
    for i in range(STEPS):
        value, everywhere = run(everywhere, *split)
        expected, weights = alone(weights, before, after)
        difference = max(difference, abs(float(value) - float(expected)))
        if arguments.process == 0:
            print(f"step {i}: loss {value:.6f}, on one device {expected:.6f}")

    names = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    counts = {n: len(re.findall(rf" {n}(?:-start)?\(", run.as_text())) for n in names}
    if arguments.process == 0:
        print(f"{mesh.size} devices: {dict(mesh.shape)}; {counts}")
    if counts["all-gather"] or counts["all-to-all"] or difference > 1e-5:
        print("error: arrays were gathered, or losses differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
