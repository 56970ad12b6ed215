from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.convolutions import CHANNELS, TAPS, ConvolutionStack
from safetydpo.judges.perceptual import ClipTowerDistance, ConvolutionDistance, load_perceptual

# Indices, channels and sizes of the convolutions in torchvision's `features`, from its documented architectures.
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
VGG16 = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
    17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
PARAMETERS = {"alexnet": 2_469_696, "vgg16": 14_714_688}


def pictures(seed: int, number: int = 2, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, side, side, 3), generator=generator, dtype=torch.uint8)


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of AlexNet with torchvision's names: its convolutions, and some of a classifier."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"classifier.1.weight": torch.zeros(2, 2)}
    for place, (outputs, inputs, size) in ALEXNET.items():
        tensors[f"features.{place}.weight"] = 0.05 * torch.randn(outputs, inputs, size, size, generator=generator)
        tensors[f"features.{place}.bias"] = 0.05 * torch.randn(outputs, generator=generator)
    return tensors


def heads(weight: float = 0.5) -> dict[str, Tensor]:
    return {f"lin{n}.model.1.weight": torch.full((1, c, 1, 1), weight) for n, c in enumerate(CHANNELS["alexnet"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(random_weights(), tmp_path / "model.safetensors")
    return tmp_path


def test_weights_have_torchvision_s_names_and_shapes() -> None:
    with torch.device("meta"):
        stacks = {name: ConvolutionStack(name) for name in ("alexnet", "vgg16")}
    vgg16 = {place: (*shape, 3) for place, shape in VGG16.items()}
    for name, layout in (("alexnet", ALEXNET), ("vgg16", vgg16)):
        expected = {f"features.{p}.weight": (o, i, s, s) for p, (o, i, s) in layout.items()}
        expected |= {f"features.{place}.bias": (shape[0],) for place, shape in layout.items()}
        found = {key: tuple(value.shape) for key, value in stacks[name].state_dict().items()}  # type: ignore[index]
        assert found == expected
        assert sum(value.numel() for value in stacks[name].parameters()) == PARAMETERS[name]  # type: ignore[index]


@pytest.mark.parametrize(("name", "side"), [("alexnet", 64), ("vgg16", 32)])
def test_what_is_read_are_rectified_layers_of_known_width(name: str, side: int) -> None:
    stack = ConvolutionStack(name)  # type: ignore[arg-type]
    assert all(isinstance(stack.features[place], torch.nn.ReLU) for place in TAPS[name])  # type: ignore[index]
    with torch.no_grad():
        found = stack(torch.zeros(1, 3, side, side))
    assert tuple(layer.shape[1] for layer in found) == CHANNELS[name]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["clip_tower", "alexnet"])
def test_a_picture_is_at_no_distance_from_itself_and_order_does_not_matter(kind: str, folder: Path) -> None:
    network = load_perceptual(kind, demo_weights() / "clip" if kind == "clip_tower" else folder)  # type: ignore[arg-type]
    one, other = pictures(0), pictures(1)
    assert network.distance(one, one).tolist() == [0.0, 0.0]
    there, back = network.distance(one, other), network.distance(other, one)
    assert there.tolist() == back.tolist()
    assert bool((there > 0).all())
    assert network.name == kind
    assert len(network.weights_sha256) == 64


def test_the_clip_tower_sees_a_large_change_as_larger() -> None:
    network = ClipTowerDistance(demo_weights() / "clip")
    plain = torch.full((1, 32, 32, 3), 120, dtype=torch.uint8)
    dotted, crossed = plain.clone(), plain.clone()
    dotted[0, 15, 15] = 130
    crossed[0, 4:28] = 250
    assert float(network.distance(plain, dotted)) < float(network.distance(plain, crossed))


def test_pictures_are_normalised_as_imagenet_s(folder: Path) -> None:
    """LPIPS takes [-1, 1] less (-.030, -.088, -.188), over (.458, .448, .450): to three digits."""
    network, images = ConvolutionDistance("alexnet", folder), pictures(3, side=40)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = ((images.float() / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2)
    torch.testing.assert_close(network._pixels(images), expected, atol=5e-3, rtol=0)


def test_heads_weigh_the_channels(folder: Path) -> None:
    """Heads of 0.5 everywhere give 0.5 x 5 layers x the mean over layers; the fingerprint tells them apart."""
    plain = ConvolutionDistance("alexnet", folder)
    save_file(heads(), folder / "heads.safetensors")
    learned = ConvolutionDistance("alexnet", folder)
    one, other = pictures(0, side=40), pictures(1, side=40)
    torch.testing.assert_close(learned.distance(one, other), 2.5 * plain.distance(one, other))
    assert learned.weights_sha256 != plain.weights_sha256


def test_missing_weights_say_where_to_put_them(tmp_path: Path) -> None:
    wanted = (
        "expected the weights of alexnet at .*model.safetensors, found none: save torchvision's state dict of alexnet "
        "there as safetensors, and the heads of lpips beside it as heads.safetensors, or name another folder in "
        "identity.evaluation.measures.alexnet"
    )
    with pytest.raises(SafetyDPOError, match=wanted):
        load_perceptual("alexnet", tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"features.3.bias": None}, r"expected shape \(192,\) at features.3.bias in .*, found nothing"),
        ({"features.3.bias": torch.zeros(3)}, r"expected shape \(192,\) at features.3.bias in .*, found shape \(3,\)"),
        ({"features.12.bias": torch.zeros(3)}, r"expected nothing at features.12.bias in .*, found shape \(3,\)"),
        ({"features.3.bias": torch.full((192,), torch.nan)}, "expected finite weights .* infinity in features.3.bias"),
    ],
    ids=["missing", "shape", "unknown", "nan"],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Tensor | None], wanted: str, folder: Path) -> None:
    tensors = {k: v for k, v in {**random_weights(), **change}.items() if v is not None}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SafetyDPOError, match=wanted):
        ConvolutionDistance("alexnet", folder)


def test_a_file_that_is_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(SafetyDPOError, match="expected the weights of alexnet as safetensors .* convert them once"):
        ConvolutionDistance("alexnet", folder)


def test_heads_of_another_network_are_refused(folder: Path) -> None:
    save_file({**heads(), "lin1.model.1.weight": torch.zeros(1, 128, 1, 1)}, folder / "heads.safetensors")
    wanted = (
        r"expected shape \(1, 192, 1, 1\) at lin1.model.1.weight in .*, found \(1, 128, 1, 1\): put the heads of lpips"
    )
    with pytest.raises(SafetyDPOError, match=wanted):
        ConvolutionDistance("alexnet", folder)


def test_pictures_that_would_vanish_are_refused(folder: Path) -> None:
    network = ConvolutionDistance("alexnet", folder)
    with pytest.raises(
        SafetyDPOError, match="expected pictures of 31 pixels a side or more for alexnet, found 16 x 16"
    ):
        network.distance(pictures(0, side=16), pictures(1, side=16))
    assert network.distance(pictures(0, side=31), pictures(1, side=31)).shape == (2,)
