"""A tiny random GPT-2 of the true class, saved to a folder and read back as any model is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from safetydpo.errors import SafetyDPOError
from safetydpo.pairs.writer_messages import write_messages
from safetydpo.pairs.writer_transformers import TransformersWriter
from safetydpo.pairs.writers import Reply, WriteRequest
from safetydpo.prompts.concepts import ConceptEntry

REQUEST = WriteRequest(ConceptEntry(("violence",), "bomb", "test", "MIT"), 0, 2)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def save_model(
    folder: Path, *, positions: int = 4096, chat_template: str | None = None, eos: int | None = None
) -> Path:
    """Every byte is a token, so that an answer is as many bytes as tokens; token 256 ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={**{letter: index for index, letter in enumerate(alphabet)}, "<end>": 256}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=257, n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    if eos is not None:
        # Whatever stands before, the end follows.
        with torch.no_grad():
            model.transformer.wte.weight.zero_()
            model.transformer.ln_f.bias.fill_(1.0)
            model.transformer.wte.weight[256].fill_(eos)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpt2"))


def load(folder: Path | str, **more: Any) -> TransformersWriter:
    settings = {"revision": None, "device": "cpu", "dtype": "float32", "temperature": 1.0, "max_tokens": 12, "seed": 0}
    return TransformersWriter(model=str(folder), **settings | more)


def ask(writer: TransformersWriter, *attempts: int) -> list[Reply]:
    async def together() -> list[Reply]:
        requests = [WriteRequest(REQUEST.concept, attempt, 2) for attempt in attempts or (0,)]
        return list(await asyncio.gather(*(writer.write(request) for request in requests)))

    return asyncio.run(together())


def test_an_answer_with_its_tokens(folder: Path):
    (reply,) = ask(load(folder))
    question = "\n\n".join(part["content"] for part in write_messages(REQUEST)) + "\n"
    assert reply.prompt_tokens == len(question.encode())
    assert (reply.completion_tokens, reply.finish_reason) == (12, "length")
    assert reply.text
    assert reply.model == str(folder)


def test_a_request_has_its_own_draws_whatever_was_asked_before(folder: Path):
    """Equal requests, equal answers, alone or among others; the global generator is left as it was."""
    writer = load(folder)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = ask(writer, 0, 1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert ask(writer, 1) == [second]
    assert first.text != second.text
    assert ask(load(folder, seed=1)) != [first]


def test_temperature_zero_takes_the_likeliest_token(folder: Path):
    cold = [ask(load(folder, temperature=0.0, seed=seed))[0].text for seed in (0, 1)]
    assert cold[0] == cold[1]


def test_an_answer_that_ends_by_itself(tmp_path: Path):
    (reply,) = ask(load(save_model(tmp_path, eos=50.0)))
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("", "stop", 1)


def test_the_chat_template_of_the_tokenizer_is_used(tmp_path: Path):
    (reply,) = ask(load(save_model(tmp_path, chat_template=TEMPLATE)))
    system, user = (part["content"] for part in write_messages(REQUEST))
    assert reply.prompt_tokens == len(f"<system>{system}<user>{user}<answer>".encode())


def test_a_question_longer_than_the_model_takes(tmp_path: Path):
    writer = load(save_model(tmp_path, positions=64))
    with pytest.raises(SafetyDPOError, match="expected a question shorter than the 64 tokens that .* takes, found 1"):
        ask(writer)


def test_a_local_model_is_named_by_its_content(folder: Path, tmp_path: Path):
    copy = save_model(tmp_path)
    assert load(copy).settings == load(folder).settings
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    assert load(copy).settings != load(folder).settings


def test_a_folder_with_pickles_only(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(
        SafetyDPOError, match=r"safetensors weights .* found only 'pytorch_model.bin', which is never read"
    ):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(
        SafetyDPOError, match="expected safetensors weights of a language model in .*, found none: save"
    ):
        load(tmp_path)


def test_code_of_a_model_is_never_run(folder: Path, tmp_path: Path):
    """The folder asks for a class of its own; the file that would be imported leaves a mark."""
    copy = save_model(tmp_path / "model")
    mark = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((copy / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(
        SafetyDPOError, match="expected a causal language model with safetensors weights and no code of"
    ):
        load(copy)
    assert not mark.exists()


def test_no_model_of_that_name():
    with pytest.raises(SafetyDPOError, match="no code of its own at '/nowhere/at/all', found: .*; correct --model"):
        load("/nowhere/at/all")


def test_closing_drops_the_model(folder: Path):
    writer = load(folder)
    asyncio.run(writer.close())
    assert writer._network is None
