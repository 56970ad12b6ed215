from __future__ import annotations

from safetydpo.artifacts import layout
from safetydpo.artifacts.storage import Location


def test_places(store: Location):
    assert layout.stage_folder(store, "pairs").path == f"{store.path}/pairs"
    assert layout.scratch_folder(store, "demo").path == f"{store.path}/scratch/demo"
    assert layout.merged_adapter_file(store).path == f"{store.path}/merged/pytorch_lora_weights.safetensors"
    assert layout.summary_file(store).path == f"{store.path}/report/summary.json"
    assert layout.evidence_file(store, "expert:hate", 2).path == f"{store.path}/expert_hate-seed2.json"
    assert layout.report_file(store).path == f"{store.path}/report/index.html"
    assert layout.report_record(store).path == f"{store.path}/report/record.json"


def test_the_demo_weights_are_inside_the_package():
    folder = layout.demo_weights()
    assert folder.parts[-3:] == ("safetydpo", "demo", "weights")
    assert folder.is_dir()
