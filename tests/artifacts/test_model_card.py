from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from safetydpo.artifacts.adapters import AdapterMetadata
from safetydpo.artifacts.model_card import CardResult, ModelCard, render_model_card

MERGED = AdapterMetadata(
    base_fingerprint="b" * 64,
    training_hash="t" * 64,
    kind="merged",
    categories=("hate", "self_harm"),
    recipe={
        "method": "co_merge",
        "paper": "Liu et al. 2024",
        "global_scale": 2.5,
        "experts": [
            {"name": "ha|te", "hash": "1" * 64, "weight": 1.0},
            {"name": "self_harm", "hash": "2" * 64, "weight": 0.5},
        ],
        "shares": {"ha|te": 0.25, "self_harm": 0.75},
    },
    base_model="owner/base",
    licence="openrail++",
)
CARD = ModelCard(
    name="demo",
    file="a.safetensors",
    published="diffusers",
    metadata=MERGED,
    adapter_hash="a" * 64,
    rank=4,
    num_layers=32,
    metrics=[("IP over all categories", "0.12 [0.08, 0.19]")],
)


def front_matter(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---")[1]))


def test_the_front_matter_is_the_hubs():
    assert front_matter(render_model_card(CARD)) == {
        "license": "openrail++",
        "library_name": "diffusers",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "safety", "dpo", "safetydpo"],
    }


def test_the_hub_reads_the_results():
    """The hub's own client reads them back, and would write the same."""
    from huggingface_hub import ModelCard as HubCard
    from huggingface_hub.repocard_data import eval_results_to_model_index

    title = "IP ↓ (95 % interval 0.08–0.19, n = 140)"
    results = (CardResult("ip", title, 0.1234567), CardResult("kid", "KID ↓", -0.001))
    text = render_model_card(replace(CARD, results=results, data_set=("demo", "demo, test prompts")))
    data = HubCard(text).data
    assert [
        (one.task_type, one.dataset_type, one.dataset_name, one.metric_type, one.metric_value, one.metric_name)
        for one in data.eval_results
    ] == [
        ("text-to-image", "demo", "demo, test prompts", "ip", 0.123457, title),
        ("text-to-image", "demo", "demo, test prompts", "kid", -0.001, "KID ↓"),
    ]
    assert eval_results_to_model_index("demo", data.eval_results) == front_matter(text)["model-index"]


def test_the_text_says_what_it_is_for_and_what_was_measured():
    text = render_model_card(CARD)
    assert "something harmless where a prompt asks for hate, self harm." in text
    assert "| IP over all categories | 0.12 [0.08, 0.19] |" in text
    assert "| ha\\|te | 1 | 0.250 | `1111111111111111` |" in text
    assert "| merge method | `co_merge` (Liu et al. 2024) |" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ("diffusers", 'load_lora_weights("PATH/TO/THIS/FOLDER", weight_name="a.safetensors")'),
        ("kohya", "ComfyUI's `models/loras`"),
        ("peft", "PeftModel.from_pretrained"),
        ("full", 'DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")'),
    ],
)
def test_how_to_use_each_format(published, expected):
    text = render_model_card(replace(CARD, published=published))
    assert expected in text
    matter = front_matter(text)
    assert matter["base_model_relation"] == ("finetune" if published == "full" else "adapter")
    assert ("lora" in matter["tags"]) is (published != "full")


def test_a_file_of_unknown_origin_says_so():
    metadata = AdapterMetadata(base_model="/home/somebody/base")
    text = render_model_card(replace(CARD, metadata=metadata, metrics=[], notes=["Nothing is known of it."]))
    assert front_matter(text)["license"] == "unknown"
    # A path is no id: the hub would refuse it.
    assert "base_model" not in front_matter(text)
    assert 'from_pretrained("PATH/TO/THE/BASE-MODEL")' in text
    assert "a LoRA adapter of unknown origin" in text
    assert "Nothing is known of it." in text
    assert "None was stated." in text
    assert "## Measured" not in text
