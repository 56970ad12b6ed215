"""ShieldGemma 2's way on a tiny random network of the true class, against the whole model asked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    ShieldGemma2Config,
    ShieldGemma2ForImageClassification,
    ShieldGemma2Processor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from safetydpo.config.judges import JudgesConfig
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.judges.build import fingerprint_judge, load_judge
from tests.judges.pictures import several

POLICIES = {"red": "No red .", "blue": "No blue ."}
WORDS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "Yes", "No")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def write_tiny_shieldgemma(folder: Path) -> Path:
    words = [*WORDS, "red", "blue", "."]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    ShieldGemma2Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        fast,
        chat_template=TEMPLATE,
        image_seq_length=4,
        policy_definitions=POLICIES,
    ).save_pretrained(folder)
    text = Gemma3TextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=16, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ShieldGemma2ForImageClassification(
            ShieldGemma2Config(
                text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=4, eoi_token_index=5,
                image_token_index=6, yes_token_index=7, no_token_index=8,
            )
        )  # fmt: skip
        # Freshly initialised, no picture reaches the text: the projection between them is zero.
        model.model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> JudgesConfig:
    return JudgesConfig(shieldgemma=str(write_tiny_shieldgemma(tmp_path_factory.mktemp("shieldgemma"))))


def test_scores_are_the_share_of_yes_asked_one_by_one(settings: JudgesConfig):
    """One picture and one policy at a time, and the softmax over the logits of the two words by hand."""
    folder = settings.shieldgemma
    processor = ShieldGemma2Processor.from_pretrained(folder)
    model = ShieldGemma2ForImageClassification.from_pretrained(folder).eval()
    expected = []
    for picture in several():
        row = []
        for policy in processor.policy_definitions:
            inputs = processor(images=[Image.fromarray(picture.numpy())], policies=[policy], return_tensors="pt")
            with torch.no_grad():
                logits = model.model(**inputs).logits[0, -1].double()
            yes, no = logits[WORDS.index("Yes")].exp(), logits[WORDS.index("No")].exp()
            row.append(float(yes / (yes + no)))
        expected.append(row)
    judge = load_judge("shieldgemma", settings)
    found = judge.policy_scores(several())
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-4)
    assert len({round(value, 4) for row in expected for value in row}) > 5, "these could not tell a wrong order"
    verdicts = judge.judge(several())
    assert verdicts.unsafe_score == pytest.approx([max(row) for row in expected], abs=1e-3)
    assert verdicts.is_unsafe == tuple(max(row) > 0.5 for row in expected)
    assert judge.judge([]).unsafe_score == ()


def test_what_is_missing_or_no_such_model(settings: JudgesConfig, tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"expected execution\.judges\.shieldgemma for judge 'shieldgemma', found none"
    ):
        fingerprint_judge("shieldgemma")
    with pytest.raises(UsageError, match=r"expected config\.json and safetensors of ShieldGemma 2 in"):
        load_judge("shieldgemma", JudgesConfig(shieldgemma=str(tmp_path)))
    own = fingerprint_judge("shieldgemma", settings)
    for file in Path(settings.shieldgemma).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert fingerprint_judge("shieldgemma", JudgesConfig(shieldgemma=str(tmp_path))) == own
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert fingerprint_judge("shieldgemma", JudgesConfig(shieldgemma=str(tmp_path))) != own
    with pytest.raises(SafetyDPOError, match=r"expected ShieldGemma 2 with its processor .*that does not load"):
        load_judge("shieldgemma", JudgesConfig(shieldgemma=str(tmp_path)))
