"""What the final evaluation measures of stored pictures beside the judges' verdicts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from safetydpo.config.fields import Distinct, Frozen


class MeasuresConfig(Frozen):
    """Distances between pictures of the base and of an adapter, on neutral prompts (docs/metrics.md)."""

    cmmd: bool = False
    """CMMD between each row's pictures and the base's, of the CLIP embeddings that the evaluation stores."""
    perceptual: Distinct[Literal["clip_tower", "alexnet", "vgg16"]] = ()
    """Networks by whose layers each picture is compared with the base's of the same prompt and seed. `clip_tower` is
    the picture tower of `clip`; `alexnet` and `vgg16` are LPIPS and need a folder of weights."""
    clip: str = "demo"
    """CLIP model of `clip_tower`: `demo`, or a local folder in transformers format."""
    alexnet: str | None = None
    """Folder with `model.safetensors` (torchvision's state dict) and optionally `heads.safetensors` (those of lpips);
    without heads all channels count alike. None = no such weights."""
    vgg16: str | None = None
    """The same of VGG16."""
    inception: str | None = None
    """Safetensors file of Inception-v3 (pytorch-fid's weights of 2015-12-05, or torchvision's) for FID and KID.
    None = neither is measured."""
    reference_pictures: str | None = None
    """Local folder of PNG or WebP pictures that FID and KID are measured against, beside the base's. None = the base's
    only."""

    @model_validator(mode="after")
    def _networks_have_weights(self) -> Self:
        for name in self.perceptual:
            if name != "clip_tower" and getattr(self, name) is None:
                raise ValueError(
                    f"identity.evaluation.measures.perceptual {name!r} needs identity.evaluation.measures.{name}, "
                    "the folder of its weights"
                )
        if self.reference_pictures is not None and self.inception is None:
            raise ValueError(
                "identity.evaluation.measures.reference_pictures needs identity.evaluation.measures.inception, the "
                "network that they are compared by"
            )
        return self
