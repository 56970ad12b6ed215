"""Turn Q16's published pickle into safetensors, once and by hand."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save

from safetydpo.artifacts.storage import Location
from safetydpo.errors import SafetyDPOError
from safetydpo.judges.q16 import PROMPTS
from safetydpo.judges.q16_pickle import read_prompts


def convert_q16(source: Location, target: Location, *, sha256: str) -> None:
    """Write Q16's published pickle as safetensors; its checksum must be the one that is given.

    Raises:
        SafetyDPOError: if the checksum differs, or the pickle holds anything else than two prompts.
    """
    data = source.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    wanted = sha256.strip().lower()
    if found != wanted:
        raise SafetyDPOError(
            f"expected the sha256 {wanted} of {source}, found {found}: compare it with the file that Q16's authors "
            "publish, and get that again if it differs"
        )
    prompts = torch.from_numpy(read_prompts(data).copy())
    rows = "not inappropriate, inappropriate"
    target.write_bytes(save({PROMPTS: prompts}, metadata={"source_sha256": found, "rows": rows}))
