from __future__ import annotations

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
)
BASE = Answers(unsafe=rows(1.0, 1.0), safe=rows(2.0, 2.0), safe_own=rows(1.0, 1.0), benign=rows(2.0))


def test_numbers_by_hand():
    """Unsafe errors 1, 1 become 4, 1; safe ones 4, 4 become 1, 9: rises 3, 0 and -3, 5; margins 6, -5.

    margin = 0.5 / 1; safe_fall = -1 / 4; own safe errors 1, 1 become 1, 4: 1.5 / 1; benign 4 becomes 5: 1 / 4. The way
    from 1 to 3 is 4 long (squared), what is left of it 1 and 4: redirection = 1 - 2.5 / 4.
    """
    policy = Answers(unsafe=rows(2.0, 1.0), safe=rows(1.0, 3.0), safe_own=rows(1.0, 2.0), benign=rows(5.0**0.5))
    assert proxy_numbers(policy, BASE, ASKED) == pytest.approx(
        {
            "margin": 0.5,
            "accuracy": 0.5,
            "safe_fall": -0.25,
            "redirection": 0.375,
            "safe_rise": 1.5,
            "benign_rise": 0.25,
        }
    )


def test_the_base_itself_has_gone_no_way_and_done_no_damage():
    found = proxy_numbers(BASE, BASE, ASKED)
    assert found == dict.fromkeys(("margin", "accuracy", "safe_fall", "redirection", "safe_rise", "benign_rise"), 0.0)


def test_blowing_an_adapter_up_raises_the_margin_and_not_the_redirection():
    """Along a direction that raises the unsafe error more than the safe one, the way leads past the safe answer."""

    def at(scale: float) -> dict[str, float]:
        push = scale * rows(1.0, 1.0)
        policy = Answers(BASE.unsafe + push, BASE.safe + 0.5 * push, BASE.safe_own + 0.5 * push, BASE.benign)
        return proxy_numbers(policy, BASE, ASKED)

    margins = [at(scale)["margin"] for scale in (2.0, 8.0, 64.0)]
    assert margins == sorted(margins)
    assert at(2.0)["redirection"] == 1.0
    assert at(64.0)["redirection"] < at(8.0)["redirection"] < 0.0


def test_numbers_without_meaning_are_refused():
    with pytest.raises(SafetyDPOError, match="base to answer unsafe and safe captions differently, found no diff"):
        proxy_numbers(BASE, Answers(rows(3.0, 3.0), BASE.safe, BASE.safe_own, BASE.benign), ASKED)
    broken = Answers(rows(float("nan"), 1.0), BASE.safe, BASE.safe_own, BASE.benign)
    with pytest.raises(SafetyDPOError, match=r"expected finite predictions .* lower identity\.search\.scale_range"):
        proxy_numbers(broken, BASE, ASKED)


def test_value_by_hand():
    """-0.4 and 10 times what lies above the ceilings: 0.02 and 0.01 of them."""
    rung = HeldOutRung(proxy="redirection", safe_rise_max=0.2, benign_rise_max=0.1)
    numbers = {"redirection": 0.4, "margin": 9.0, "safe_rise": 0.1, "benign_rise": 0.1}
    assert proxy_value(numbers, rung) == pytest.approx(-0.4)
    assert proxy_value({**numbers, "safe_rise": 0.22, "benign_rise": 0.11}, rung) == pytest.approx(-0.4 + 0.3)
    assert proxy_value(numbers, HeldOutRung(proxy="margin", benign_rise_max=0.1)) == -9.0


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
    found = ask(backbone, ProxyQuestions(asked, asked, asked, asked, whole), batch_size=4)
    assert torch.equal(found.benign, whole)
    assert not found.benign.requires_grad
