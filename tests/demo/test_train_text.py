"""The contrastive loss by hand, and the tokenizer that ships."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from safetydpo.artifacts.layout import demo_weights
from safetydpo.demo.prompts import write_all_captions
from safetydpo.demo.tokenizer import MAX_TOKENS, load_tokenizer, train_merges, write_tokenizer
from safetydpo.demo.train_text import contrastive_loss


def test_loss_by_hand() -> None:
    """Two orthogonal pairs at scale s: every row is softmax of (s, 0), so the loss is log(1 + exp(-s)); lengths do
    not matter. At s = ln 3: log(1 + 1/3) = 0.2877."""
    images, texts = torch.eye(2) * 5.0, torch.eye(2) * 0.1
    loss = contrastive_loss(images, texts, torch.tensor(math.log(3)))
    assert math.isclose(loss.item(), math.log(4 / 3), rel_tol=1e-5)


def test_merges_by_hand() -> None:
    """In `ab ab ac` the pair (a, b</w>) is seen twice and every other once, so it is merged first."""
    assert train_merges(["ab ab ac"], num_merges=1) == [("a", "b</w>")]


def test_written_tokenizer_loads_and_splits_by_its_merges(tmp_path: Path) -> None:
    write_tokenizer([("a", "b</w>")], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, CLIPTokenizer)
    assert len(tokenizer) == 2 * 256 + 1 + 2
    assert tokenizer.tokenize("AB ac") == ["ab</w>", "a", "c</w>"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("ab", padding="max_length").input_ids == [start, 512, *([end] * (MAX_TOKENS - 2))]


def test_no_caption_of_the_world_is_cut() -> None:
    tokenizer = load_tokenizer(demo_weights() / "base" / "tokenizer")
    tokens = tokenizer(write_all_captions()[::7], truncation=False).input_ids
    assert max(len(row) for row in tokens) <= MAX_TOKENS
