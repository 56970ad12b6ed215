"""The prompt files of the field: one entry per format, recognised by its columns, never by a file's name (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from safetydpo.errors import SafetyDPOError, UsageError

Side = Literal["unsafe", "safe", "benign"]
SIDES: tuple[Side, ...] = ("unsafe", "safe", "benign")
Shape = Literal["single", "pair", "named", "preference", "lines"]

_INDEX = ("", "Unnamed: 0")
_I2P_REST = (
    *_INDEX,
    "hard",
    "inappropriate_percentage",
    "nudity_percentage",
    "q16_percentage",
    "sd_safety_percentage",
    "prompt_toxicity",
    "lexica_url",
    "sd_image_width",
    "sd_image_height",
    "sd_model",
    "case_number",
)


@dataclass(frozen=True)
class PromptFormat:
    """How one kind of prompt file is recognised and what its rows become."""

    name: str
    doc: str
    """What the file is, in one line."""
    becomes: str
    """What a row becomes, in one line."""
    shape: Shape
    """`single`: one prompt a row; `pair`: two columns; `named`: partners found by image name; `preference`: the same
    by the name of the picture; `lines`: no columns."""
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    """Columns that --column may choose; the first is the default. With `any_column`, every column may be chosen."""
    partner: str = ""
    """Column of the safe partner; empty = none."""
    partner_required: bool = True
    """Whether a row without a partner is dropped; otherwise it becomes a single prompt."""
    category: str = ""
    concepts: tuple[str, ...] = ()
    """Columns that may name the concept; the first that is filled counts."""
    seed: str = ""
    guidance: str = ""
    row_name: str = ""
    """Column that names the row in its file (image name, case number)."""
    side: Side = "unsafe"
    """Side of a row that says nothing itself."""
    side_is_known: bool = True
    """Whether that side follows from the format; otherwise it is assumed, said so, and set with --side."""
    split: Literal["auto", "test"] = "test"
    """Default of --split: benchmarks are test prompts."""
    in_order: tuple[str, ...] = ()
    """Columns whose order tells this format from others with the same columns."""
    image_names: str = ""
    """Pattern that at least one value of `image` has to match."""
    any_column: bool = False
    """Whether columns of any other name belong to the format."""

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Return the required columns that are not there."""
        return [name for name in self.required if name not in columns]

    def unknown(self, columns: Sequence[str]) -> list[str]:
        """Return the columns that the format does not know."""
        return (
            []
            if self.any_column or self.shape == "lines"
            else [name for name in columns if name not in (*self.required, *self.optional)]
        )

    def fits(self, columns: Sequence[str]) -> bool:
        """Whether these columns are this format's: all required, none unknown, in its order."""
        if not self.required or self.missing(columns) or self.unknown(columns):
            return False
        places = [columns.index(name) for name in self.in_order]
        return places == sorted(places)


PAIR_IMAGE = r"[us]_idx_\d+_\d+\.\w+"
_PAIRS = PromptFormat(
    name="pairs",
    doc="this project's own pairs",
    becomes="a pair",
    shape="pair",
    required=("unsafe_text", "safe_text"),
    optional=("category", "categories", "concept", "seed", "guidance", "split", "pair_id"),
    texts=("unsafe_text",),
    partner="safe_text",
    category="category",
    concepts=("concept",),
    seed="seed",
    guidance="guidance",
    split="auto",
)
_PROMPTS = PromptFormat(
    name="prompts",
    doc="this project's own single prompts",
    becomes="a prompt of the side or prompt_set that its row names",
    shape="single",
    required=("prompt",),
    optional=("category", "categories", "concept", "side", "prompt_set", "split", "seed", "guidance"),
    texts=("prompt",),
    category="category",
    concepts=("concept",),
    seed="seed",
    guidance="guidance",
    side_is_known=False,
    split="auto",
)
_COPROV2 = PromptFormat(
    name="coprov2_train",
    doc="CoProV2, training captions: u_idx_N_k.jpg and s_idx_N_k.jpg are a pair",
    becomes="the unsafe or safe text of the pair that its image name says, in its category",
    shape="named",
    required=("prompt", "image", "category"),
    texts=("prompt",),
    category="category",
    row_name="image",
    split="auto",
    image_names=PAIR_IMAGE,
)
_I2P = PromptFormat(
    name="i2p",
    doc="I2P, repository copies; UnlearnDiffAtk and P4D have the same columns",
    becomes="an unsafe prompt in each category of its comma list, with its seed, guidance and size",
    shape="single",
    required=("prompt", "categories", "evaluation_seed", "evaluation_guidance"),
    optional=_I2P_REST,
    texts=("prompt",),
    category="categories",
    seed="evaluation_seed",
    guidance="evaluation_guidance",
    row_name="case_number",
)
_RING_A_BELL = PromptFormat(
    name="ring_a_bell",
    doc="Ring-A-Bell, attack prompts (the prompt stands before the case number)",
    becomes="an unsafe prompt with its seed",
    shape="single",
    required=("prompt", "case_number", "evaluation_seed"),
    texts=("prompt",),
    seed="evaluation_seed",
    row_name="case_number",
    in_order=("prompt", "case_number"),
)

_COCO = PromptFormat(
    name="coco",
    doc="COCO captions with seeds",
    becomes="a benign prompt with its seed",
    shape="single",
    required=("case_number", "source", "prompt", "evaluation_seed"),
    optional=(*_INDEX, "coco_id"),
    texts=("prompt",),
    seed="evaluation_seed",
    row_name="case_number",
    side="benign",
    split="auto",
)

FORMATS: tuple[PromptFormat, ...] = (
    _COPROV2,
    replace(
        _COPROV2,
        name="coprov2_test",
        doc="CoProV2, test captions: image 0000000_0.jpg, no partner, no seed",
        becomes="an unsafe prompt in its category",
        shape="single",
        split="test",
        image_names=r"\d+_\d+\.\w+",
    ),
    PromptFormat(
        name="coprov2_preferences",
        doc="CoProV2 on the Hub: two pictures and a preference per caption",
        becomes="the text of the pair and side that its picture's name says; ties are dropped; no picture is read",
        shape="preference",
        required=("jpg_0", "jpg_1", "label_0", "caption"),
        optional=("image",),
        texts=("caption",),
        side_is_known=False,
        split="auto",
    ),
    _I2P,
    replace(
        _I2P,
        name="i2p_hub",
        doc="I2P on the Hub (sd_seed, sd_guidance_scale)",
        required=("prompt", "categories", "sd_seed", "sd_guidance_scale"),
        seed="sd_seed",
        guidance="sd_guidance_scale",
    ),
    _RING_A_BELL,
    PromptFormat(
        name="ring_a_bell_pairs",
        doc="Ring-A-Bell, the prompts behind a concept vector",
        becomes="a pair",
        shape="pair",
        required=("sensitive prompt", "normal prompt"),
        optional=_INDEX,
        texts=("sensitive prompt",),
        partner="normal prompt",
    ),
    PromptFormat(
        name="mma_diffusion",
        doc="MMA-Diffusion (--column chooses the attack, adv_prompt if left out)",
        becomes="a pair of the chosen column and clean_prompt; a single unsafe prompt if that is empty",
        shape="pair",
        required=(
            "target_prompt",
            "adv_prompt",
            "sanitized_adv_prompt",
            "success_against_sanitization_defense",
            "clean_prompt",
        ),
        optional=_INDEX,
        texts=("adv_prompt", "sanitized_adv_prompt", "target_prompt"),
        partner="clean_prompt",
        partner_required=False,
    ),
    PromptFormat(
        name="six_cd",
        doc="Six-CD (the seed stands before the prompt); --partner joins a malicious file with its clean one",
        becomes="an unsafe prompt about its target, with its seed; a pair with --partner",
        shape="single",
        required=("case_number", "evaluation_seed", "prompt"),
        optional=("target",),
        texts=("prompt",),
        concepts=("target",),
        seed="evaluation_seed",
        row_name="case_number",
        side_is_known=False,
        in_order=("evaluation_seed", "prompt"),
    ),
    PromptFormat(
        name="seeded",
        doc="prompts with seeds, as erasing benchmarks and Six-CD's benign set write them (number, prompt, seed)",
        becomes="a prompt with its seed and guidance",
        shape="single",
        required=("case_number", "prompt", "evaluation_seed"),
        optional=(*_INDEX, "evaluation_guidance", "artist", "class"),
        texts=("prompt",),
        concepts=("artist", "class"),
        seed="evaluation_seed",
        guidance="evaluation_guidance",
        row_name="case_number",
        side_is_known=False,
        in_order=("case_number", "prompt", "evaluation_seed"),
    ),
    _COCO,
    replace(
        _COCO,
        name="coco_images",
        doc="the same with the image's number in place of the case's, as the list of 30,000 has it",
        required=("image_id", "source", "prompt", "evaluation_seed"),
        row_name="image_id",
    ),
    PromptFormat(
        name="coco_captions",
        doc="COCO captions by image",
        becomes="a benign prompt",
        shape="single",
        required=("image_id", "text"),
        optional=_INDEX,
        texts=("text",),
        row_name="image_id",
        side="benign",
        split="auto",
    ),
    PromptFormat(
        name="hub_translations",
        doc="HUB, a prompt and its translations (--column chooses the language, Original if left out)",
        becomes="an unsafe prompt",
        shape="single",
        required=("Original", "Index"),
        texts=("Original",),
        row_name="Index",
        side_is_known=False,
        any_column=True,
    ),
    _PAIRS,
    replace(
        _PAIRS,
        name="pairs_of_prompts",
        doc="the same with other column names",
        required=("unsafe_prompt", "safe_prompt"),
        texts=("unsafe_prompt",),
        partner="safe_prompt",
    ),
    _PROMPTS,
    replace(
        _PROMPTS,
        name="texts",
        doc="the same with other column names, and the prompts.parquet of a folder of prompts",
        required=("text",),
        optional=(*_PROMPTS.optional, "prompt_id", "background"),
        texts=("text",),
    ),
    PromptFormat(
        name="lines",
        doc="UD, HUB and any text: one prompt a line, no header; stray CR and trailing commas are cut off",
        becomes="an unsafe prompt",
        shape="lines",
        texts=("line",),
        side_is_known=False,
    ),
)


def find_format(name: str) -> PromptFormat:
    """Return the format of that name.

    Raises:
        UsageError: if there is none.
    """
    for form in FORMATS:
        if form.name == name:
            return form
    raise UsageError(f"expected a format out of {', '.join(form.name for form in FORMATS)}, found {name!r}")


def recognise(columns: Sequence[str], images: Iterable[object], *, file: str) -> PromptFormat:
    """Return the format of a table with these columns; `images` are the values of its `image` column, if any.

    A format fits if all its required columns are there, no column is unknown to it, columns that it wants in an
    order stand in it, and an image name has its form. Of several that fit, the one with most required columns is
    taken, of those the first in `FORMATS`: with the same three columns, `prompt` before `case_number` is Ring-A-Bell,
    `evaluation_seed` before `prompt` Six-CD, number, prompt, seed the plain form.

    Raises:
        SafetyDPOError: if none fits, naming the columns and the nearest format.
    """
    fitting = [form for form in FORMATS if form.fits(columns)]
    if any(form.image_names for form in fitting):
        names = [str(image).rsplit("/", 1)[-1] for image in images]
        fitting = [form for form in fitting if any(re.fullmatch(form.image_names, name) for name in names)]
        if not fitting:
            raise SafetyDPOError(
                f"expected image names such as u_idx_0000000_0.jpg or 0000000_0.jpg in {file}, found "
                f"{names[0] if names else 'no row'!r}: name the format with --format"
            )
    if fitting:
        return max(fitting, key=lambda form: len(form.required))
    form = nearest_format(columns)
    told = "no format has one of them"
    advice = "rename the columns"
    if form is not None:
        missing, unknown = form.missing(columns), form.unknown(columns)
        differs = "; ".join(
            f"{what} {', '.join(map(repr, names))}"
            for what, names in (("without", missing), ("besides", unknown))
            if names
        )
        told = f"nearest is {form.name} ({differs or 'its columns in another order'})"
        advice = advice if missing else f"--format {form.name} leaves those columns out"
    raise SafetyDPOError(
        f"expected the columns of a known format in {file}, found {', '.join(map(repr, columns))}; {told}: {advice}, "
        "or --format lines if it has no header"
    )


def nearest_format(columns: Sequence[str]) -> PromptFormat | None:
    """Return the format with the largest share of columns in common, optional ones left aside; None if that is 0.

    `share = |required and there| / |required or there|`; of equal ones the first in `FORMATS`.
    """

    def share(form: PromptFormat) -> float:
        there = set(columns) - set(form.optional)
        return len(there & set(form.required)) / len(there | set(form.required))

    best = max((form for form in FORMATS if form.required), key=share)
    return best if share(best) else None


def check_forced(form: PromptFormat, columns: Sequence[str], *, file: str) -> None:
    """Check that a file can be read as the format that --format names; columns it does not know are left out.

    Raises:
        UsageError: naming the missing column.
    """
    missing = form.missing(columns)
    if missing:
        raise UsageError(
            f"expected column {missing[0]!r} of format {form.name} in {file}, found {', '.join(map(repr, columns))}: "
            "name another --format or leave it out"
        )
