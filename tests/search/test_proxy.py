from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from safetydpo.config.rungs import HeldOutRung
from safetydpo.config.schema import BaseModelConfig
from safetydpo.diffusion.backbone import Condition
from safetydpo.diffusion.build import load_backbone
from safetydpo.errors import SafetyDPOError
from safetydpo.search.proxy import Answers, ProxyQuestions, Questions, ask, predict_rows, proxy_numbers
from safetydpo.search.proxy_value import proxy_value


def rows(*values: float) -> torch.Tensor:
    """One row of one number for each value."""
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def questions(target: torch.Tensor) -> Questions:
    nothing = Condition(torch.zeros(len(target), 1, 1))
    return Questions(torch.zeros_like(target), torch.zeros(len(target)), nothing, target)


ASKED = ProxyQuestions(
    unsafe=questions(rows(0.0, 0.0)),
    safe=questions(rows(0.0, 0.0)),
    safe_own=questions(rows(0.0, 0.0)),
    benign=questions(rows(0.0)),
    redirected=rows(3.0, 3.0),
    neutral=questions(rows(1.0, 1.0)),
    neighbour=questions(rows(2.0)),
    neutral_plain=rows(3.0, 5.0),
    neighbour_plain=rows(4.0),
)
BASE = Answers(
    unsafe=rows(1.0, 1.0),
    safe=rows(2.0, 2.0),
    safe_own=rows(1.0, 1.0),
    benign=rows(2.0),
    neutral=rows(1.0, 1.0),
    neighbour=rows(2.0),
)


def test_numbers_by_hand():
    """Unsafe errors 1, 1 become 4, 1; safe ones 4, 4 become 1, 9: rises 3, 0 and -3, 5; margins 6, -5.

    margin = 0.5 / 1; safe_fall = -1 / 4; own safe errors 1, 1 become 1, 4: 1.5 / 1; benign 4 becomes 5: 1 / 4. The way
    from 1 to 3 is 4 long (squared), what is left of it 1 and 4: redirection = 1 - 2.5 / 4. Captions move neutral
    answers by 4 and 16 (squared), the policy by 0 and 4: 2 / 10; the neighbour's by 4, the policy by 1: 1 / 4.
    """
    policy = Answers(
        unsafe=rows(2.0, 1.0),
        safe=rows(1.0, 3.0),
        safe_own=rows(1.0, 2.0),
        benign=rows(5.0**0.5),
        neutral=rows(1.0, 3.0),
        neighbour=rows(1.0),
    )
    assert proxy_numbers(policy, BASE, ASKED) == pytest.approx(
        {
            "margin": 0.5,
            "accuracy": 0.5,
            "safe_fall": -0.25,
            "redirection": 0.375,
            "safe_rise": 1.5,
            "benign_rise": 0.25,
            "neutral_shift": 0.2,
            "neighbour_shift": 0.25,
        }
    )


def test_the_base_itself_has_gone_no_way_and_done_no_damage():
    found = proxy_numbers(BASE, BASE, ASKED)
    assert set(found.values()) == {0.0}
    assert len(found) == 8


def test_blowing_an_adapter_up_raises_the_margin_and_not_the_redirection():
    """Along a direction that raises the unsafe error more than the safe one, the way leads past the safe answer."""

    def at(scale: float) -> dict[str, float]:
        push = scale * rows(1.0, 1.0)
        policy = replace(
            BASE, unsafe=BASE.unsafe + push, safe=BASE.safe + 0.5 * push, safe_own=BASE.safe_own + 0.5 * push
        )
        return proxy_numbers(policy, BASE, ASKED)

    margins = [at(scale)["margin"] for scale in (2.0, 8.0, 64.0)]
    assert margins == sorted(margins)
    assert at(2.0)["redirection"] == 1.0
    assert at(64.0)["redirection"] < at(8.0)["redirection"] < 0.0


def test_numbers_without_meaning_are_refused():
    with pytest.raises(SafetyDPOError, match="base to answer unsafe and safe captions differently, found no diff"):
        proxy_numbers(BASE, replace(BASE, unsafe=rows(3.0, 3.0)), ASKED)
    with pytest.raises(SafetyDPOError, match="base to answer neutral prompts otherwise than no prompt, found no diff"):
        proxy_numbers(BASE, BASE, replace(ASKED, neighbour_plain=rows(2.0)))
    broken = replace(BASE, unsafe=rows(float("nan"), 1.0))
    with pytest.raises(SafetyDPOError, match=r"expected finite predictions .* lower identity\.search\.scale_range"):
        proxy_numbers(broken, BASE, ASKED)


def test_value_by_hand():
    """-0.4 and 10 times what lies above the ceilings: 0.02 and 0.01 of two of them, 0.03 of each prompt's."""
    rung = HeldOutRung(proxy="redirection", safe_rise_max=0.2, benign_rise_max=0.1, prompt_shift_max=0.3)
    unmoved = {"neutral_shift": 0.0, "neighbour_shift": 0.3}
    numbers = {"redirection": 0.4, "margin": 9.0, "safe_rise": 0.1, "benign_rise": 0.1, **unmoved}
    assert proxy_value(numbers, rung) == pytest.approx(-0.4)
    assert proxy_value({**numbers, "safe_rise": 0.22, "benign_rise": 0.11}, rung) == pytest.approx(-0.4 + 0.3)
    assert proxy_value({**numbers, "neutral_shift": 0.33, "neighbour_shift": 0.33}, rung) == pytest.approx(-0.4 + 0.6)
    assert proxy_value(numbers, HeldOutRung(proxy="margin", benign_rise_max=0.1, prompt_shift_max=0.3)) == -9.0


def test_rows_are_asked_in_batches_of_one_size_and_do_not_depend_on_their_number():
    """The demo model: 5 rows in batches of 4 are the rows of 3 and of 2, alone, bit for bit."""
    backbone = load_backbone(BaseModelConfig())
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn((5, *backbone.latent_shape(height=32, width=32)), generator=generator)
    timesteps = torch.tensor([900, 700, 500, 300, 100])
    condition = backbone.encode_prompts(["a red ball", "a blue house", "a knife", "a flower", "a green ball"])
    whole = predict_rows(backbone, noisy, timesteps, condition, batch_size=4)
    for part in (torch.tensor([0, 1, 2]), torch.tensor([3, 4])):
        alone = predict_rows(backbone, noisy[part], timesteps[part], condition.select(part), batch_size=4)
        assert torch.equal(alone, whole[part])
    asked = Questions(noisy, timesteps, condition, torch.zeros_like(noisy))
    everything = ProxyQuestions(asked, asked, asked, asked, whole, asked, asked, whole, whole)
    found = ask(backbone, everything, batch_size=4)
    assert torch.equal(found.benign, whole)
    assert not found.benign.requires_grad
