"""The same classifier in Flax, to be trained or with the weights of the PyTorch one."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digits.config import Config
from natten.flax import NeighborhoodAttention2D, load_torch

_EPSILON = 1e-5  # of PyTorch's LayerNorm; Flax's default is another


class Block(nnx.Module):
    """As `digits.model_torch.Block`."""

    def __init__(self, config: Config, dilation: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(config.dim, epsilon=_EPSILON, rngs=rngs)
        self.attn = NeighborhoodAttention2D(
            config.dim,
            config.num_heads,
            config.kernel_size,
            dilation=dilation,
            rel_pos_bias=True,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(config.dim, epsilon=_EPSILON, rngs=rngs)
        self.fc1 = nnx.Linear(config.dim, config.mlp_dim, rngs=rngs)
        self.fc2 = nnx.Linear(config.mlp_dim, config.dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        hidden = jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False)
        return x + self.fc2(hidden)


class Classifier(nnx.Module):
    """As `digits.model_torch.Classifier`."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, config.dim, kernel_size=(3, 3), rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(config, d, rngs) for d in config.dilations))
        self.norm = nnx.LayerNorm(config.dim, epsilon=_EPSILON, rngs=rngs)
        self.head_drop = nnx.Dropout(config.head_drop, rngs=rngs)
        self.head = nnx.Linear(config.size**2 * config.dim, config.classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.blocks(self.stem(images))
        return self.head(self.head_drop(self.norm(x).reshape(len(x), -1)))


def load(config: Config, state_dict: Mapping[str, np.ndarray]) -> Classifier:
    """The Flax classifier with the weights of a PyTorch classifier of the same config.

    It is in evaluation mode.
    """
    model = Classifier(config, nnx.Rngs(0))

    def set_linear(layer: nnx.Linear | nnx.Conv, name: str) -> None:
        weight = state_dict[f"{name}.weight"]
        # [out, in] -> [in, out]; of a convolution [out, in, height, width] -> [height, ..., out]
        layer.kernel = nnx.Param(jnp.asarray(weight.transpose(*range(2, weight.ndim), 1, 0)))
        layer.bias = nnx.Param(jnp.asarray(state_dict[f"{name}.bias"]))

    def set_norm(layer: nnx.LayerNorm, name: str) -> None:
        layer.scale = nnx.Param(jnp.asarray(state_dict[f"{name}.weight"]))
        layer.bias = nnx.Param(jnp.asarray(state_dict[f"{name}.bias"]))

    set_linear(model.stem, "stem")
    for i, block in enumerate(model.blocks.layers):
        assert isinstance(block, Block)
        set_norm(block.norm1, f"blocks.{i}.norm1")
        load_torch(block.attn, state_dict, prefix=f"blocks.{i}.attn")
        set_norm(block.norm2, f"blocks.{i}.norm2")
        set_linear(block.fc1, f"blocks.{i}.fc1")
        set_linear(block.fc2, f"blocks.{i}.fc2")
    set_norm(model.norm, "norm")
    set_linear(model.head, "head")
    model.eval()
    return model
