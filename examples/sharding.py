"""Splits neighborhood attention over several devices, and shows what each computes.

    python examples/sharding.py

Runs on the CPU, of which it makes four devices: two along the batch, two along the heads.
"""

from __future__ import annotations

import os
import re
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from natten.jax import na2d


def loss(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.mean(na2d(query, key, value, kernel_size=7, rpb=bias) ** 2)


def main() -> int:
    """Returns the exit status."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = (8, 28, 28, 4, 32)  # batch, height, width, heads, head_dim
    arrays = [jax.random.normal(key, tokens) for key in keys[:3]]
    arrays.append(0.1 * jax.random.normal(keys[3], (4, 13, 13)))  # heads, relative positions
    by_token = NamedSharding(mesh, PartitionSpec("data", None, None, "model", None))
    by_head = NamedSharding(mesh, PartitionSpec("model"))
    shardings = [by_token, by_token, by_token, by_head]
    names = ["query", "key", "value", "bias"]
    split = [jax.device_put(x, s) for x, s in zip(arrays, shardings, strict=True)]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*split).compile()
    _, gradients = step(*split)

    print(f"{mesh.devices.size} devices: {dict(mesh.shape)}")
    for name, gradient in zip(names, gradients, strict=True):
        shard = gradient.addressable_shards[0].data.shape
        print(f"gradient of {name}: {gradient.shape}, on each device {shard}")
    used = {}
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        lines = re.findall(rf"= (.*?) {collective}(?:-start)?\(", step.as_text())
        used[collective] = ", ".join(lines) or "none"
        print(f"{collective}: {used[collective]}")

    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)
    difference = max(
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(jax.device_get(gradients), expected, strict=True)
    )
    print(f"largest difference of a gradient from that on one device: {difference:.1e}")
    if used["all-gather"] != "none" or difference > 1e-5:
        print("error: arrays were gathered, or gradients differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
