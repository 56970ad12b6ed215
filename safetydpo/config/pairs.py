"""Settings of picture pairs: how they are made, judged and selected, and what is stored of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from safetydpo.config.fields import Distinct, Frozen, Rate, added_field

GENERATE = "generate"


class PairsConfig(Frozen):
    """How the pictures of a pair are made, and which pairs are good enough to be preferences."""

    source: str = added_field(GENERATE, min_length=1)
    """`generate`: drawn by the base model, judged and selected; or a folder that `safetydpo import-pairs` wrote, local
    or `s3://`: then all its rows of `prompts.categories` are taken as they are, and nothing is drawn but the pictures
    of `prompts.retention_prompts`. Settings of drawing and judging are ignored."""
    safe_picture: Literal["same_seed", "sdedit"] = added_field("same_seed")
    """`same_seed`: the safe picture is drawn from the noise of the unsafe one; `sdedit`: it is the unsafe picture,
    noised and drawn anew under the safe prompt."""
    sdedit_strength: float = added_field(0.6, gt=0.0, le=1.0)
    """Share of the sampling steps that `sdedit` draws anew; 1 = from pure noise. Ignored with `same_seed`."""
    sdedit_negative: Literal["unsafe_prompt", "empty"] = added_field("unsafe_prompt")
    """What the unguided branch of `sdedit` sees. The unsafe prompt pushes away from it, by the guidance scale: far, if
    that is large and the two prompts say much the same. Ignored with `same_seed`."""
    judges: Distinct[str] = added_field(("demo_select",), min_length=1)
    """Judges that look at both pictures. Of several, the greatest unsafe score counts, and the greatest probability of
    `unrecognisable` among those that know it; if none does, that rule is not applied and the record says so."""
    unsafe_score_min: Rate = 0.5
    """Least judge score (probability of an unsafe concept) of the unsafe picture."""
    safe_score_max: Rate = 0.5
    """Greatest judge score of the safe picture."""
    unrecognisable_max: Rate = 0.5
    """Greatest probability of `unrecognisable`, either picture."""
    layout_pixel_max: Rate | None = added_field(None)
    """Greatest mean difference of the two pictures' luminance (0 to 1), averaged over a grid of 8 x 8; None = any."""
    layout_embedding_max: float | None = added_field(None, ge=0.0, le=2.0)
    """Greatest cosine distance of the two pictures' CLIP embeddings; None = any."""
    layout_clip: str = added_field("demo")
    """CLIP model of `layout_embedding_max`: `demo` (ships with the package) or a local folder, transformers format."""
    min_kept_per_category: int = Field(8, ge=1)
    """Fewer kept pairs than this in a category is an error that names it."""
    min_kept_per_concept: int = added_field(0, ge=0)
    """Fewer kept pairs than this of a concept is a warning that lists it; 0 = only if nothing is left of it. Pairs
    without a concept (most imported formats name none) are not one group: neither this nor `max_kept_per_concept`
    counts them."""
    max_kept_per_concept: int | None = added_field(None, ge=1)
    """Of a concept's good pairs this many are kept, best first: those with the greatest difference between the unsafe
    and the safe picture's unsafe score, then in the order of their ids; None = all. Pairs without a concept are left
    alone."""
    picture_format: Literal["png", "webp"] = added_field("png")
    """How pictures are stored; both are lossless. WebP is smaller and slower to write."""
    latents: Literal["mean", "mean_and_deviation"] = added_field("mean")
    """What is stored of the autoencoder's posterior for each picture: its mean, or also its standard deviation."""
    flipped_latents: bool = added_field(False)
    """Whether the latents of the mirrored pictures of pairs are stored too, for `dpo.flip_rate`."""
    max_error_rate: Rate = 0.01
    """Share of pictures that may fail for good before the stage fails."""
