"""What a single file of weights holds, told by the names in its header (pure).

Files of Stable Diffusion 1, 2 and XL hold the whole model. Those of Stable Diffusion 3 and FLUX.1 are published with
and without text encoders, with and without the autoencoder: what a file has none of is read from the folder beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetydpo.errors import SafetyDPOError

PREFIXES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusion3Pipeline": {
        "transformer": ("model.diffusion_model.", "joint_blocks."),
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "FluxPipeline": {
        "transformer": ("model.diffusion_model.", "double_blocks."),
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    },
}
"""Pipeline class -> network -> how the names of its tensors begin; families that are missing here hold everything."""
_SCALES = (".scale_weight", ".scale_input", ".weight_scale", ".weight_scale_2", ".input_scale", ".absmax", "scaled_fp8")


def networks_beside(family: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the networks of which a file with tensors of these names holds none, but never the denoiser, sorted."""
    known = PREFIXES.get(family, {})
    held = {network for name in names for network, prefixes in known.items() if name.startswith(prefixes)}
    return tuple(sorted(set(known) - held - {"transformer"}))


def require_plain(names: Iterable[str], *, file: Path) -> None:
    """Refuse weights that mean nothing without a scale, which stands beside them and which diffusers would pass over.

    Raises:
        SafetyDPOError: naming the first such scale.
    """
    scale = min((name for name in names if name.endswith(_SCALES)), default=None)
    if scale is not None:
        raise SafetyDPOError(
            f"expected plain weights in {file}, found quantised ones with a scale apart ({scale!r}): use the file of "
            "the same model in 16 or 32 bits"
        )
