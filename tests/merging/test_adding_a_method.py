"""`docs/adding-a-merge-method.md`, followed: its file is found by the registry, merges, and passes its own test."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safetydpo.artifacts.adapters import AdapterMetadata, LoraLayer, adapter_hash
from safetydpo.errors import UsageError
from safetydpo.merging import methods, registry
from safetydpo.merging.algebra import delta, rank_of
from safetydpo.merging.merge import Expert, merge_experts
from safetydpo.merging.method import MergeMethod


@pytest.fixture
def blocks(root: Path) -> list[str]:
    """The Python of the page."""
    text = (root / "docs" / "adding-a-merge-method.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def added(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MergeMethod]:
    """The page's file beside those of the package, under the name that the page gives it."""
    with pytest.raises(UsageError, match="found 'median'"):
        registry.find_method("median")
    (tmp_path / "robust.py").write_text(blocks[0], encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "METHODS", registry.collect_methods())
    yield registry.find_method("median")
    sys.modules.pop(f"{methods.__name__}.robust")
    del methods.robust  # type: ignore[attr-defined]


def make_expert(name: str, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {"q": LoraLayer(torch.randn(2, 7, generator=generator), torch.randn(6, 2, generator=generator))}
    return Expert(name, adapter_hash(layers), layers, AdapterMetadata("base"))


def test_the_page_s_method_merges(added: MergeMethod):
    experts = [make_expert(name, seed) for seed, name in enumerate("abc")]
    exact = merge_experts(experts, method="median", global_scale=2.0)
    stack = torch.stack([delta(expert.layers["q"]) for expert in experts])
    torch.testing.assert_close(delta(exact.layers["q"]), 2 * stack.sort(dim=0).values[1])
    assert exact.recipe["paper"] == added.paper
    cut = merge_experts(experts, method="median", output_rank=2)
    assert rank_of(cut.layers["q"]) == 2
    assert cut.overall_truncation_error > 0


def test_the_page_s_test_passes(added: MergeMethod, blocks: list[str]):
    assert added.name == "median"
    namespace: dict[str, object] = {"__name__": "test_robust"}
    exec(compile(blocks[1], "test_robust.py", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_") and callable(value)]
    assert len(tests) == 2
    for test in tests:
        test()


def test_what_holds_of_every_method_holds_of_the_page_s(added: MergeMethod):
    from tests.merging import test_registry

    for check in (
        lambda: test_registry.test_nothing_given_is_changed("median"),
        lambda: test_registry.test_a_weight_is_an_expert_with_a_scaled_delta("median"),
        lambda: test_registry.test_a_method_that_uses_no_density_or_seed_says_so("median"),
        lambda: test_registry.test_one_expert_of_weight_one_comes_back("median", torch.float32, 1e-6),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_registry, "METHODS", {"median": added})
            check()


def test_the_page_says_what_the_entry_has(root: Path):
    text = (root / "docs" / "adding-a-merge-method.md").read_text(encoding="utf-8")
    fields = set(MergeMethod.__dataclass_fields__)
    for name in ("uses_density", "draws", "options", "row_aligned", "selects", "reshapes", "needs_inputs"):
        assert name in fields
        assert f"`{name}`" in text
