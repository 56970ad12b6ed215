from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from safetydpo.artifacts.layout import demo_weights
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.distances import frechet_distance
from safetydpo.judges.clip import ClipScorer
from safetydpo.judges.features import ClipFeatures, InceptionFeatures, TorchmetricsFeatures
from safetydpo.judges.inception import InceptionV3, load_inception, prepare_pixels

# torchvision's inception_v3 has 27,161,264 parameters: less its auxiliary classifier (3,326,696) and fc (2,049,000).
PARAMETERS = 27_161_264 - 3_326_696 - 2_049_000


def pictures(seed: int, number: int = 2, side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, side, side, 3), generator=generator, dtype=torch.uint8)


def state_dict(classes: int = 1008) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = InceptionV3("fid")
    return {**network.state_dict(), "fc.weight": torch.zeros(classes, 2048), "fc.bias": torch.zeros(classes)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(state_dict(), file)
    return file


def test_weights_have_torchvision_s_names_and_number() -> None:
    with torch.device("meta"):
        network = InceptionV3("torchvision")
    assert sum(value.numel() for value in network.parameters()) == PARAMETERS
    names = network.state_dict()
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.bias": (192,),
    }.items():
        assert tuple(names[name].shape) == shape


def test_the_two_sets_of_weights_pool_differently() -> None:
    """With one set of numbers in both, features differ: averages without the padding, and a maximum at the end."""
    tensors = {name: value for name, value in state_dict().items() if not name.startswith("fc.")}
    heads = {classes: {"fc.weight": torch.zeros(classes, 2048)} for classes in (1000, 1008)}
    networks = {classes: load_inception({**tensors, **head}, source="a file") for classes, head in heads.items()}
    assert [networks[classes][1] for classes in (1008, 1000)] == ["fid", "torchvision"]
    pixels = prepare_pixels(pictures(0, number=1))
    with torch.no_grad():
        found = [network(pixels) for network, _ in networks.values()]
    assert found[0].shape == (1, 2048)
    assert not torch.allclose(found[0], found[1])


def test_pixels_are_prepared_as_pytorch_fid_does() -> None:
    """0 and 255 become -1 and 1; a picture of the network's own size is not resized."""
    image = torch.zeros(1, 299, 299, 3, dtype=torch.uint8)
    image[0, 0, 0] = 255
    pixels = prepare_pixels(image)
    assert pixels[0, :, 0, 0].tolist() == [1, 1, 1]
    assert pixels[0, :, 0, 1].tolist() == [-1, -1, -1]
    assert prepare_pixels(pictures(0, number=1)).shape == (1, 3, 299, 299)


def test_missing_weights_say_where_to_put_them(tmp_path: Path) -> None:
    wanted = (
        "expected the weights of Inception-v3 at .*none.safetensors, found none: save the state dict of pytorch-fid "
        r"\(pt_inception-2015-12-05\) or torchvision there, as safetensors, or name its place in "
        "identity.evaluation.measures.inception"
    )
    with pytest.raises(SafetyDPOError, match=wanted):
        InceptionFeatures(tmp_path / "none.safetensors")


@pytest.mark.parametrize("classes", [None, 10])
def test_weights_of_unknown_origin_are_refused(classes: int | None) -> None:
    tensors = {} if classes is None else {"fc.weight": torch.zeros(classes, 2048)}
    with pytest.raises(SafetyDPOError, match=f"expected fc.weight with 1008 classes .* in a file, found {classes}"):
        load_inception(tensors, source="a file")


def test_torchmetrics_takes_our_network(weights: Path) -> None:
    """Its FID through our network equals our own distance of the features; bytes come as torchmetrics has them."""
    network = _FirstFeatures(InceptionFeatures(weights), 3)
    first, second = pictures(0, number=5), pictures(1, number=5)
    metric = FrechetInceptionDistance(feature=TorchmetricsFeatures(network))
    metric.update(second.permute(0, 3, 1, 2), real=True)
    metric.update(first.permute(0, 3, 1, 2), real=False)
    expected = frechet_distance(network.embed(first).double().numpy(), network.embed(second).double().numpy())
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert network.network.name == "inception"


class _FirstFeatures:
    """The first features of a network: FID of five pictures has no use for 2048."""

    name, version, weights_sha256 = "first", "1", ""

    def __init__(self, network: InceptionFeatures, number: int) -> None:
        self.network, self.num_features = network, number

    def embed(self, images: Tensor) -> Tensor:
        return self.network.embed(images)[:, : self.num_features]


def test_clip_features_are_those_of_the_caption_scores() -> None:
    network, images = ClipFeatures(demo_weights() / "clip"), pictures(0, side=32)
    assert torch.equal(network.embed(images), ClipScorer(demo_weights() / "clip").embed_images(images))
    assert network.num_features == network.embed(images).shape[1] == 128
