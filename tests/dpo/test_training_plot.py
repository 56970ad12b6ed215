from __future__ import annotations

import io

from PIL import Image

from safetydpo.dpo.training_plot import plot_training
from tests.dpo.validations import validation


def history(steps: int = 8) -> list[dict[str, float]]:
    names = ("loss", "preference_loss", "implicit_accuracy", "margin", "gradient_norm", "learning_rate")
    errors = ("error_policy_safe", "error_policy_unsafe", "error_reference_safe", "error_reference_unsafe")
    return [
        {"step": step} | dict.fromkeys(names, 0.5 + 0.01 * step) | dict.fromkeys(errors, 0.1) for step in range(steps)
    ]


def pixels(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_a_plot_is_a_picture_and_equal_numbers_give_equal_bytes() -> None:
    marks = [validation(0, value=0.9), validation(4, value=0.4), validation(8, value=0.2)]
    one, other = (plot_training(history(), marks, title="hate", published=4) for _ in range(2))
    assert one == other
    assert pixels(one).size == (1210, 660)
    assert one != plot_training(history(), marks, title="hate", published=8)


def test_a_training_without_validation_is_drawn_too() -> None:
    assert pixels(plot_training(history(), title="hate")).size == (1210, 660)


def test_an_interrupted_training_without_a_step_is_drawn_too() -> None:
    assert pixels(plot_training([], [validation(0)], title="hate")).size == (1210, 660)


def test_a_training_without_a_reference_is_drawn_too() -> None:
    rows = [row | {"error_reference_safe": 0.0, "error_reference_unsafe": 0.0} for row in history()]
    assert pixels(plot_training(rows, [validation(0)], title="mapo")).size == (1210, 660)
