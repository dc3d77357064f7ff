"""Learns weather on a sphere: neighborhood attention whose windows wrap around it.

    python examples/weather.py [--out demo_output] [--steps 800] [--seed 0]

1. Makes data: blobs of a tracer on a grid of latitude and longitude, carried by a wind of jets and
   waves. Where the air at each point came from is computed exactly.
2. Trains a small model on single time steps. Its windows go on at the other end along longitude
   (boundary "circular") and end at the poles along latitude ("cut").
3. Compares its next step, and forecasts of many steps, with persistence: nothing changes.
4. Draws a forecast.

Runs on the CPU, downloads nothing, and fails if the next step is not 5 times as close as
persistence.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see demo.py

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import natten

LATITUDES, LONGITUDES = 24, 48
DIM, HEADS, DEPTH, KERNEL_SIZE = 32, 4, 3, 5
BATCH, PEAK_RATE = 4, 6e-3
LEAD = 6  # steps of the longest forecast
MIN_GAIN = 5.0  # by which the next step must be closer than persistence


def grid() -> Tensor:
    """Latitude and longitude of the tokens in radians, [latitudes, longitudes, 2]; no poles."""
    latitude = (torch.arange(LATITUDES) + 0.5) * math.pi / LATITUDES - math.pi / 2
    longitude = (torch.arange(LONGITUDES) + 0.5) * 2 * math.pi / LONGITUDES
    return torch.stack(torch.meshgrid(latitude, longitude, indexing="ij"), -1)


def wind(points: Tensor) -> Tensor:
    """Velocity [.., 2] along latitude and longitude, in radians per step: jets and a wave."""
    latitude, longitude = points.unbind(-1)
    south_north = 0.11 * latitude.cos().square() * (3 * longitude).cos()
    west_east = 0.26 * (3 * latitude).cos() * latitude.cos() + 0.08
    west_east = west_east + 0.07 * latitude.sin() * latitude.cos() * (3 * longitude).sin()
    return torch.stack([south_north, west_east], -1)


def origins(points: Tensor) -> Tensor:
    """Where the air at each of `points` was a step ago, by four Runge-Kutta steps back in time."""
    h = -1 / 4
    for _ in range(4):
        first = wind(points)
        second = wind(points + h / 2 * first)
        third = wind(points + h / 2 * second)
        fourth = wind(points + h * third)
        points = points + h / 6 * (first + 2 * second + 2 * third + fourth)
    return points


def vectors(points: Tensor) -> Tensor:
    """Points of the unit sphere, [.., 3]."""
    latitude, longitude = points.unbind(-1)
    ring = latitude.cos()
    return torch.stack([ring * longitude.cos(), ring * longitude.sin(), latitude.sin()], -1)


@dataclass
class World:
    """Fields that a fixed wind carries over the sphere."""

    places: list[Tensor]  # where the air at each token was 0, 1, ... steps ago, [tokens, 3]

    @staticmethod
    def make(steps: int) -> World:
        points = [grid().flatten(0, 1)]
        for _ in range(steps):
            points.append(origins(points[-1]))
        return World([vectors(x) for x in points])

    def fields(self, count: int, steps: int, random: torch.Generator) -> Tensor:
        """[count, steps + 1, latitudes, longitudes, 1]: random blobs, and what becomes of them."""
        blobs = 24
        centers = torch.randn(count, 3, blobs, generator=random)
        centers = centers / centers.norm(dim=1, keepdim=True)
        sharpness = 10 + 30 * torch.rand(count, 1, blobs, generator=random)
        height = torch.randn(count, blobs, 1, generator=random)
        series = [
            torch.exp(sharpness * (place @ centers - 1)) @ height
            for place in self.places[: steps + 1]
        ]
        return torch.stack(series, 1).unflatten(2, (LATITUDES, LONGITUDES))


class Block(nn.Module):
    """Neighborhood attention and a perceptron, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attention = natten.NeighborhoodAttention2D(
            DIM, HEADS, KERNEL_SIZE, rel_pos_bias=True, boundary=("cut", "circular")
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.GELU(), nn.Linear(3 * DIM, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """Maps a field [batch, latitudes, longitudes, 1] to that of the next step.

    Besides the field it is given the wind and the place of each token, by waves around the sphere.
    """

    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        points = grid()
        latitude, longitude = points.unbind(-1)
        waves = [f(n * longitude) for n in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
        waves += [f(n * latitude) for n in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
        place = torch.cat([torch.stack(waves, -1), 10 * wind(points)], -1)
        self.register_buffer("place", place)
        self.embed_field = nn.Linear(1, DIM)
        self.embed_place = nn.Linear(place.shape[-1], DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Linear(DIM, 1)
        nn.init.zeros_(self.head.weight)  # begins as persistence
        nn.init.zeros_(self.head.bias)

    def forward(self, field: Tensor) -> Tensor:
        x = self.embed_field(field) + self.embed_place(self.place)
        return field + self.head(self.blocks(x))


def area() -> Tensor:
    """What share of the sphere a token stands for, 1 on average, [latitudes, 1, 1]."""
    share = grid()[:, :1, :1].cos()
    return share / share.mean()


def error(forecast: Tensor, truth: Tensor) -> Tensor:
    """Root of the mean square error over the sphere."""
    return ((forecast - truth).square() * area()).mean().sqrt()


def train(world: World, steps: int, seed: int = 0) -> tuple[Model, list[float]]:
    """A trained model, and the loss of every step: the mean square error of the next step over that
    of persistence."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.15)
    losses = []
    for step in range(steps):
        now, later = world.fields(BATCH, 1, random).unbind(1)
        loss = (error(model(now), later) / error(now, later)).square()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            recent = losses[-50:]
            print(f"step {step + 1:4}: loss {sum(recent) / len(recent):.4f}", flush=True)
    return model.eval(), losses


@torch.inference_mode()
def forecast(model: Model, field: Tensor, steps: int) -> Tensor:
    """Each step from the one before it: [count, steps + 1, latitudes, longitudes, 1]."""
    series = [field]
    for _ in range(steps):
        series.append(model(series[-1]))
    return torch.stack(series, 1)


def draw(
    truth: Tensor, predicted: Tensor, model_errors: Tensor, still_errors: Tensor
) -> plt.Figure:
    """One forecast as maps, and the errors of all by lead time."""
    figure = plt.figure(figsize=(13, 6.4))
    places = figure.add_gridspec(3, 4, width_ratios=(1, 1, 1, 1.1))
    scale = float(truth.abs().max())
    for column, lead in enumerate((0, 1, LEAD)):
        maps = {"truth": truth[lead], "model": predicted[lead]}
        maps["model - truth"] = maps["model"] - maps["truth"]
        for row, (title, field) in enumerate(maps.items()):
            axes = figure.add_subplot(places[row, column])
            axes.imshow(
                field[..., 0].numpy(), origin="lower", extent=(0, 360, -90, 90), cmap="RdBu_r",
                vmin=-scale, vmax=scale,
            )  # fmt: skip
            axes.set_xticks([0, 180, 360])
            axes.set_yticks([-90, 0, 90])
            axes.set_title(f"{title}, step {lead}", fontsize=11)
    axes = figure.add_subplot(places[:, 3])
    axes.plot(range(1, LEAD + 1), still_errors, "o-", color="#999999", label="persistence")
    axes.plot(range(1, LEAD + 1), model_errors, "o-", color="#0b57d0", label="model")
    axes.set_xlabel("steps ahead")
    axes.set_ylabel("root mean square error")
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, LEAD + 1))
    axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="for the picture")
    parser.add_argument("--steps", type=int, default=800, help="batches to train on")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    natten.use_fused_na()
    start = time.perf_counter()
    world = World.make(LEAD)
    model, _ = train(world, args.steps, args.seed)
    print(f"{time.perf_counter() - start:.0f} s of training")

    truth = world.fields(32, LEAD, torch.Generator().manual_seed(args.seed + 1))
    predicted = forecast(model, truth[:, 0], LEAD)
    leads = range(1, LEAD + 1)
    model_errors = torch.stack([error(predicted[:, lead], truth[:, lead]) for lead in leads])
    still_errors = torch.stack([error(truth[:, 0], truth[:, lead]) for lead in leads])
    for lead in leads:
        ours, still = float(model_errors[lead - 1]), float(still_errors[lead - 1])
        print(
            f"{lead} steps ahead: error {ours:.4f}, of persistence {still:.4f} "
            f"({still / ours:.1f} times as much)"
        )

    path = args.out / "weather.png"
    figure = draw(truth[0], predicted[0], model_errors, still_errors)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path.resolve()}")
    gain = float(still_errors[0] / model_errors[0])
    if not gain >= MIN_GAIN:
        print(f"error: must be {MIN_GAIN:.0f} times as close as persistence", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
