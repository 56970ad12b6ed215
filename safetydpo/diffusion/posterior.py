"""Which autoencoders have a posterior, so that a picture's latents have a deviation."""

from __future__ import annotations

from pathlib import Path

from safetydpo.diffusion.folder import read_json
from safetydpo.errors import UsageError

WITHOUT_POSTERIOR = frozenset({"AutoencoderTiny"})


def require_posterior(autoencoder: str) -> None:
    """Check that an autoencoder of this class has a posterior.

    Raises:
        UsageError: if it gives latents only.
    """
    if autoencoder in WITHOUT_POSTERIOR:
        raise UsageError(
            f"expected an autoencoder with a posterior for identity.pairs.latents mean_and_deviation, found "
            f"{autoencoder}, which gives latents only: set identity.pairs.latents=mean or use another model"
        )


def check_posterior(folder: Path) -> None:
    """Check the same of an autoencoder's folder, reading its configuration only, where it has one.

    Raises:
        UsageError: if the model's autoencoder gives latents only.
    """
    file = folder / "config.json"
    if file.is_file():
        require_posterior(str(read_json(file).get("_class_name")))
