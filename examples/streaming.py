"""Decodes a video frame by frame against a cache, and gets the bits of decoding it at once.

    python examples/streaming.py [--frames 24] [--seed 0]

A decoder of neighborhood attention over time, rows and columns, causal along time, predicts each
frame from those before it.

1. Generates a clip: every prediction becomes the next frame. Each block keeps the keys and values
   of the frames that windows of later frames still reach, and computes queries of one frame only.
2. Gives the whole clip to the same decoder at once, as training does, and compares the predictions.

The parameters are random, so that the clip shows nothing; what is compared holds for any. Runs on
the CPU and fails if one bit differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import natten
from natten.functional import na3d

CHANNELS = 3
DIM, HEADS = 32, 2
WINDOWS = (  # of each block: time, rows, columns
    {"kernel_size": (4, 5, 5), "dilation": (1, 1, 1)},
    {"kernel_size": (3, 5, 5), "dilation": (4, 1, 1)},
    {"kernel_size": (4, 5, 5), "dilation": (1, 2, 2)},
)
# With "cut" a clip may be shorter than the windows; along a causal axis that is all it says. The
# stride along time is 1, so that no window depends on how long the clip will become.
BORDERS = {"is_causal": (True, False, False), "boundary": ("cut", "cut", "cut")}


@dataclass
class Cache:
    """The keys and values of a block, [batch, frames, rows, columns, heads, head_dim]."""

    key: Tensor
    value: Tensor
    first: int = 0  # the frame with which they begin

    def append(self, key: Tensor, value: Tensor) -> None:
        self.key = torch.cat([self.key, key], 1)
        self.value = torch.cat([self.value, value], 1)

    def crop(self, first: int) -> None:
        """Forgets all frames before that one."""
        self.key = self.key[:, first - self.first :]
        self.value = self.value[:, first - self.first :]
        self.first = first


class Block(nn.Module):
    """Attention and a perceptron, each added to its input.

    All but attention works on one frame at a time, in both ways of decoding: the last bits of a
    matrix product can depend on how many rows it has.
    """

    def __init__(self, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.window = {"kernel_size": kernel_size, "dilation": dilation, **BORDERS}
        self.to_qkv = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM))
        self.proj = nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)
        )

    def qkv(self, frame: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [batch, 1, rows, columns, heads, head_dim] of a frame."""
        return self.to_qkv(frame).unflatten(-1, (3, HEADS, DIM // HEADS))[:, None].unbind(-3)

    def finish(self, frame: Tensor, attended: Tensor) -> Tensor:
        frame = frame + self.proj(attended.flatten(-2))
        return frame + self.mlp(frame)

    def forward(self, frames: list[Tensor]) -> list[Tensor]:
        """All frames of a clip at once."""
        query, key, value = (
            torch.cat(parts, 1) for parts in zip(*map(self.qkv, frames), strict=True)
        )
        attended = na3d(query, key, value, **self.window)
        return [self.finish(*pair) for pair in zip(frames, attended.unbind(1), strict=True)]

    def step(self, frame: Tensor, number: int, cache: Cache | None) -> tuple[Tensor, Cache]:
        """One more frame, and the cache with which the next one is computed."""
        query, key, value = self.qkv(frame)
        if cache is None:
            cache = Cache(key, value)
        else:
            cache.append(key, value)
        offset, size = (number, 0, 0), tuple(query.shape[2:4])
        # What this frame needs, and those after it: a dilated window holds frames of one group, so
        # that one of each group asks.
        ahead = self.window["dilation"][0]
        (first, _), *_ = natten.key_range(
            offset, (ahead, *size), (number + ahead, *size), **self.window
        )
        cache.crop(first)
        attended = na3d(
            query, cache.key, cache.value, **self.window,
            query_offset=offset, key_offset=(cache.first, 0, 0), grid_size=(number + 1, *size),
        )  # fmt: skip
        return self.finish(frame, attended[:, 0]), cache


class Decoder(nn.Module):
    """Predicts the frame after each of [batch, frames, rows, columns, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, DIM)
        self.blocks = nn.ModuleList(Block(**window) for window in WINDOWS)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CHANNELS), nn.Tanh())

    def forward(self, clip: Tensor) -> Tensor:
        frames = [self.embed(frame.contiguous()) for frame in clip.unbind(1)]
        for block in self.blocks:
            frames = block(frames)
        return torch.stack([self.head(frame) for frame in frames], 1)


class Stream:
    """A decoder that is given one frame after another."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.caches: list[Cache | None] = [None] * len(decoder.blocks)
        self.number = 0  # of the next frame

    def step(self, frame: Tensor) -> Tensor:
        """The prediction for the frame after `frame` [batch, rows, columns, channels]."""
        x = self.decoder.embed(frame)
        for i, block in enumerate(self.decoder.blocks):
            x, self.caches[i] = block.step(x, self.number, self.caches[i])
        self.number += 1
        return self.decoder.head(x)

    def cached_frames(self) -> list[int]:
        """How many frames each block keeps."""
        return [0 if cache is None else cache.key.shape[1] for cache in self.caches]


@torch.inference_mode()
def run(frames: int, size: tuple[int, int] = (16, 24), seed: int = 0) -> bool:
    """Generates a clip, decodes it at once, and returns whether all bits are equal."""
    torch.manual_seed(seed)
    decoder = Decoder().eval()
    stream = Stream(decoder)
    frame = torch.rand(1, *size, CHANNELS)

    clip, predictions, seconds = [], [], []
    for _ in range(frames):
        start = time.perf_counter()
        prediction = stream.step(frame)
        seconds.append(time.perf_counter() - start)
        clip.append(frame)
        predictions.append(prediction)
        frame = prediction
    milliseconds = 1e3 * sum(seconds) / frames
    print(f"{frames} frames of {size[0]} x {size[1]} tokens, {milliseconds:.1f} ms each")
    print(f"frames whose keys and values the blocks keep: {stream.cached_frames()}")

    start = time.perf_counter()
    at_once = decoder(torch.stack(clip, 1))
    print(f"the same clip at once: {1e3 * (time.perf_counter() - start) / frames:.1f} ms a frame")
    equal = [torch.equal(at_once[:, i], frame) for i, frame in enumerate(predictions)]
    print(f"predictions with the same bits: {sum(equal)} of {frames}")
    return all(equal)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=24, help="length of the clip")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the first frame")
    args = parser.parse_args()
    if not run(args.frames, seed=args.seed):
        print("error: frame by frame must give the bits of the whole clip", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
