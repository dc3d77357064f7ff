"""Published models, unmodified, on this package: they run, train, and compute what they define.

Each model runs a training step twice, once as it is and once with the names that it imports from
natten.functional replaced by plain PyTorch (published/standin.py). Outputs and gradients agree.
requirements/models.txt and models-nodeps.txt hold the packages; what is missing is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from published import standin  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import natten  # noqa: E402
import natten.functional  # noqa: E402

# Bounds on the largest deviation of a model. Models pass rounding errors on, so these are wider
# than the errors of one operation.
BOUND = {torch.float64: 1e-13, torch.float32: 3e-5}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=("float64", "float32"))


def training_step(build: Callable[[], nn.Module], inputs: Tensor, outputs_of: Callable) -> dict:
    """Outputs, and gradients of a loss that weighs each output with random numbers. Dropout is on;
    all that is random depends on a seed."""
    torch.manual_seed(1)
    model = build().to(inputs.dtype).train()
    # Fresh models have no biases and small scores, which would hide errors: all weights in a window
    # are nearly the same.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rpb"):
                parameter.normal_()
            elif ".query." in name or ".key." in name:
                parameter.mul_(4)
    inputs = inputs.clone().requires_grad_()
    outputs = outputs_of(model(inputs))
    loss = sum((output * torch.randn_like(output)).sum() for output in outputs.values())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {**outputs, "inputs": inputs.grad, **gradients}


def deviation(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest ||got - want|| / ||want|| over all tensors, and the tensor's name."""
    assert got.keys() == want.keys()
    worst = (0.0, "")
    for name, reference in want.items():
        scale = reference
        # A bias of the keys shifts all scores of a query alike: its gradient is zero, up to
        # rounding of sums as large as those in the gradient of the weights.
        if name.endswith("key.bias"):
            scale = want[name.replace("bias", "weight")]
        assert scale.norm() > 0, f"{name} does not take part"
        difference = ((got[name] - reference).norm() / scale.norm()).item()
        assert difference == difference, f"{name} is NaN"
        worst = max(worst, (difference, name))
    return worst


def compare(
    label: str,
    module: types.ModuleType,
    build: Callable[[], nn.Module],
    inputs: Tensor,
    outputs_of: Callable,
    capsys,
) -> None:
    names = [n for n in ("natten1dqkrpb", "natten1dav", "natten2dqkrpb", "natten2dav")
             if hasattr(module, n)]  # fmt: skip
    assert "natten2dqkrpb" in names and "natten2dav" in names
    for name in names:
        assert getattr(module, name) is getattr(natten.functional, name)
    got = training_step(build, inputs, outputs_of)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, getattr(standin, name))
        want = training_step(build, inputs, outputs_of)
    worst, where = deviation(got, want)
    with capsys.disabled():
        print(
            f"\n{label} {str(inputs.dtype)[6:]}: {worst:.1e} at most ({where}, {len(want)} tensors)"
        )
    assert worst <= BOUND[inputs.dtype]


def images(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# Hugging Face transformers: three stages of 18 x 21, 9 x 11 and 5 x 6 tokens.


def classifier_outputs(result) -> dict[str, Tensor]:
    named = {"logits": result.logits}
    for field in ("hidden_states", "attentions"):
        named |= {f"{field}.{i}": tensor for i, tensor in enumerate(result[field])}
    return named


def classifier_config(config_class, **options):
    return config_class(
        embed_dim=12,
        depths=[2, 2, 1],
        num_heads=[2, 3, 4],
        drop_path_rate=0.1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        output_hidden_states=True,
        output_attentions=True,
        **options,
    )


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        # The last stage is smaller than a window of 7: the model pads it.
        {"kernel_size": 7, "dilations": [[1, 2], [1, 1], [1]]},
        {"kernel_size": 3, "dilations": [[1, 6], [3, 2], [1]], "layer_scale_init_value": 0.5},
    ],
    ids=("kernel 7", "kernel 3"),
)
def test_transformers_dinat(options, dtype, capsys):
    pytest.importorskip("transformers", reason="needs requirements/models.txt")
    from transformers.models.dinat import DinatConfig, modeling_dinat

    config = classifier_config(DinatConfig, **options)
    compare(
        f"transformers DiNAT, kernel {config.kernel_size}",
        modeling_dinat,
        lambda: modeling_dinat.DinatForImageClassification(config),
        images(2, 3, 70, 83, dtype=dtype),
        classifier_outputs,
        capsys,
    )


@DTYPES
@pytest.mark.parametrize("kernel_size", [7, 3])
def test_transformers_nat(kernel_size, dtype, capsys):
    pytest.importorskip("transformers", reason="needs requirements/models.txt")
    from transformers.models.deprecated.nat import NatConfig, modeling_nat

    config = classifier_config(NatConfig, kernel_size=kernel_size, layer_scale_init_value=0.5)
    compare(
        f"transformers NAT, kernel {kernel_size}",
        modeling_nat,
        lambda: modeling_nat.NatForImageClassification(config),
        images(2, 3, 70, 83, dtype=dtype),
        classifier_outputs,
        capsys,
    )


@DTYPES
def test_transformers_backbone(dtype, capsys):
    """The part of DiNAT that Mask2Former and OneFormer use."""
    pytest.importorskip("transformers", reason="needs requirements/models.txt")
    from transformers.models.dinat import DinatConfig, modeling_dinat

    config = DinatConfig(
        embed_dim=8, depths=[1, 2], num_heads=[2, 2], kernel_size=5, dilations=[[4], [1, 2]],
        drop_path_rate=0.0, out_features=["stage1", "stage2"],
    )  # fmt: skip
    compare(
        "transformers DiNAT backbone, kernel 5",
        modeling_dinat,
        lambda: modeling_dinat.DinatBackbone(config),
        images(1, 3, 90, 110, dtype=dtype),
        lambda result: {f"map.{i}": tensor for i, tensor in enumerate(result.feature_maps)},
        capsys,
    )


# allin1, the music structure analyzer: 1-D along time with two dilations at once, 2-D over
# instruments and time.


@pytest.fixture
def allin1_dinat(monkeypatch) -> Iterator[types.ModuleType]:
    """The package's model without the rest of it, which needs audio libraries."""
    spec = importlib.util.find_spec("allin1")
    if spec is None:
        pytest.skip("needs requirements/models-nodeps.txt")

    def module(name: str, **attributes) -> None:
        value = types.ModuleType(name)
        vars(value).update(attributes)
        monkeypatch.setitem(sys.modules, name, value)

    # Packages of which only the submodules are loaded.
    (folder,) = spec.submodule_search_locations
    module("allin1", __path__=[folder])
    module("allin1.models", __path__=[f"{folder}/models"])
    # Its configuration is a dataclass that also registers with Hydra.
    store = types.SimpleNamespace(store=lambda **_: None)
    for name in ("hydra", "hydra.core"):
        module(name, __path__=[])
    module("hydra.core.config_store", ConfigStore=types.SimpleNamespace(instance=lambda: store))
    module("omegaconf", MISSING="???")
    yield importlib.import_module("allin1.models.dinat")
    for name in [n for n in sys.modules if n.startswith("allin1.")]:
        del sys.modules[name]


@DTYPES
@pytest.mark.parametrize(
    ("kernel_size", "frames"),
    # Windows reach over 5 * 8 * 2 = 80 and 7 * 4 * 2 = 56 frames; fewer frames are padded.
    [(5, 97), (5, 61), (7, 59), (3, 101)],
)
def test_allin1(allin1_dinat, kernel_size, frames, dtype, capsys):
    config_module = importlib.import_module("allin1.config")
    model_module = importlib.import_module("allin1.models.allinone")
    harmonix = config_module.HarmonixConfig(
        path_base_dir="", path_track_dir="", path_demix_dir="", path_feature_dir="",
        path_no_demixed_feature_dir="", duration_min=0, duration_max=0,
    )  # fmt: skip
    config = config_module.Config(
        data=harmonix, depth=3 if kernel_size == 7 else 4, kernel_size=kernel_size
    )
    compare(
        f"allin1, kernel {kernel_size}, {frames} frames",
        allin1_dinat,
        lambda: model_module.AllInOne(config),
        images(2, harmonix.num_instruments, frames, config.dim_input, dtype=dtype),
        lambda result: dict(vars(result)),
        capsys,
    )


# k-diffusion's image transformer takes natten as an attribute of the top package, and branches on
# has_fused_na(): fused heads-last, or unfused heads-first. Both with cosine similarity, no scale.


class CosineNeighborhoodBlock(nn.Module):
    def __init__(self, dim: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.heads, self.kernel_size = dim // head_dim, kernel_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.temperature = nn.Parameter(torch.full([self.heads], 10.0))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        factor = self.temperature.sqrt()[:, None]
        query, key = (nn.functional.normalize(t, dim=-1) * factor for t in qkv[:2])
        value = qkv[2]
        if natten.has_fused_na():
            x = natten.functional.na2d(query, key, value, self.kernel_size, scale=1.0)
        else:
            query, key, value = (t.movedim(-2, 1) for t in (query, key, value))
            scores = natten.functional.na2d_qk(query, key, self.kernel_size)
            weights = torch.softmax(scores, dim=-1).to(value.dtype)
            x = natten.functional.na2d_av(weights, value, self.kernel_size).movedim(1, -2)
        return self.out(x.flatten(-2))


@DTYPES
def test_k_diffusion_branches_agree(dtype, monkeypatch, capsys):
    x = images(2, 13, 17, 48, dtype=dtype)

    def step(fused: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(natten, "has_fused_na", lambda: fused)
        build = lambda: CosineNeighborhoodBlock(48, 16, kernel_size=7)  # noqa: E731
        return training_step(build, x, lambda output: {"output": output})

    worst, where = deviation(step(True), step(False))
    with capsys.disabled():
        print(f"\nk-diffusion, fused against unfused {str(dtype)[6:]}: {worst:.1e} ({where})")
    assert worst <= BOUND[dtype]


def test_functional_is_an_attribute_of_natten():
    """k-diffusion imports no more than `natten`."""
    code = "import natten, torch; q = torch.ones(1, 3, 3, 1, 1); natten.functional.na2d(q, q, q, 3)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Checkpoints of NATTEN's modules, whose parameters are called qkv, rpb and proj in all versions.


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("biased", (True, False))
@pytest.mark.parametrize("fused", (False, True))
def test_module_checkpoints_load(rank, biased, fused):
    dim, heads, k, d = 24, 3, 3, 2
    torch.manual_seed(rank)
    checkpoint = {
        "qkv.weight": torch.randn(3 * dim, dim),
        "proj.weight": torch.randn(dim, dim),
        "proj.bias": torch.randn(dim),
    }
    if biased:
        checkpoint["rpb"] = torch.randn(heads, *(2 * k - 1,) * rank)
        checkpoint["qkv.bias"] = torch.randn(3 * dim)
    checkpoint = {name: tensor.double() for name, tensor in checkpoint.items()}
    module_class = (
        natten.NeighborhoodAttention1D,
        natten.NeighborhoodAttention2D,
        natten.NeighborhoodAttention3D,
    )[rank - 1]
    module = module_class(
        dim=dim, num_heads=heads, kernel_size=k, dilation=d, rel_pos_bias=biased, qkv_bias=biased
    ).double()
    assert module.state_dict().keys() == checkpoint.keys()
    module.load_state_dict(checkpoint)

    x = torch.randn(2, *(7, 6, 9)[:rank], dim, dtype=torch.float64)
    qkv = nn.functional.linear(x, checkpoint["qkv.weight"], checkpoint.get("qkv.bias"))
    # Channels are query, key, value, and in each the heads, one after the other.
    query, key, value = qkv.unflatten(-1, (3, heads, dim // heads)).movedim((-3, -2), (0, 2))
    scores = standin.natten2dqkrpb(query * (dim // heads) ** -0.5, key, checkpoint.get("rpb"), k, d)
    mixed = standin.natten2dav(scores.softmax(-1), value, k, d).movedim(1, -2).flatten(-2)
    expected = nn.functional.linear(mixed, checkpoint["proj.weight"], checkpoint["proj.bias"])

    natten.use_fused_na(fused)
    try:
        got = module(x)
    finally:
        natten.use_fused_na(False)
    assert (got - expected).norm() <= 1e-13 * expected.norm()
