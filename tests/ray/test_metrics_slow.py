"""What Prometheus would read of a run: scraped from the agent of a real local Ray's node."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from ray_jobs.metrics import METRICS, count, gpu_utilisation, set_gauge
from ray_jobs.pools import PoolStage, fill_pool
from ray_jobs.run_context import within
from ray_jobs.train_experts import EXPERTS, LABEL, train_experts
from ray_jobs.workers import RenderWorker
from safetydpo.artifacts.schemas import IMAGE_MANIFEST, IMAGES
from safetydpo.artifacts.storage import open_location
from safetydpo.artifacts.tables import read_table
from tests.ray.closed_artifacts import close_training_data, open_run
from tests.ray.smoke_place import SMOKE, wait_for

pytestmark = pytest.mark.slow


def scrape() -> str:
    """Return what the only node exports."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.usefixtures("cluster")
def test_every_metric_is_exported_under_the_names_of_the_dashboard(root: Path):
    """A counter may be told under the name of its sum; all of them bear the run and its stage."""
    with within(run="smoke-1", stage="train"):
        for name, metric in METRICS.items():
            tags = dict.fromkeys(metric.tags, "experts")
            if metric.kind == "Gauge":
                set_gauge(name, 0.25, **tags)
            else:
                count(name, 3, **tags)
    # Outside of a run nothing is exported.
    set_gauge("safetydpo_best_objective", 7.5)
    dashboard = (root / "configs/cluster/grafana.json").read_text()
    wanted = set(re.findall(r"ray_safetydpo_\w+", dashboard))
    seen: list[str] = [""]

    def is_there() -> bool:
        seen[0] = scrape()
        return all(re.search(rf"^{name}{{", seen[0], re.MULTILINE) for name in wanted)

    assert wait_for(is_there, seconds=60), (wanted, re.findall(r"^ray_safetydpo.*$", seen[0], re.MULTILINE))
    ours = re.findall(r"^ray_safetydpo.*$", seen[0], re.MULTILINE)
    assert all('run="smoke-1"' in line and 'stage="train"' in line for line in ours), ours
    assert not any(line.endswith("7.5") for line in ours)
    assert json.loads(dashboard)["uid"] == "safetydpo"


class Scraped:
    """The highest value of each series seen so far, as a Prometheus that asks all the time would have it."""

    def __init__(self) -> None:
        self.highest: dict[str, float] = {}

    def look(self) -> None:
        for series, value in re.findall(r"^ray_(safetydpo_\w+{.*}) (\S+)$", scrape(), re.MULTILINE):
            self.highest[series] = max(float(value), self.highest.get(series, 0.0))

    def of(self, name: str, **tags: str) -> float:
        """Sum over processes of one metric under these tags."""
        wanted = [f'{tag}="{value}"' for tag, value in tags.items()]
        return sum(
            value
            for series, value in self.highest.items()
            if re.match(rf"{name}(_total)?{{", series) and all(each in series for each in wanted)
        )


@contextmanager
def scraping() -> Iterator[Scraped]:
    """Scrape twice a second while the block runs."""
    seen, stop = Scraped(), threading.Event()

    def follow() -> None:
        while not stop.wait(0.5):
            seen.look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("cluster")
def test_a_pool_of_pictures_and_a_training_tell_what_they_did(tmp_path: Path):
    """Six pictures and 5 steps of 2 pairs, made for real; nobody but the workers themselves counts them."""
    run = open_run(
        SMOKE,
        [
            f"store={tmp_path}/store",
            f"run_dir={tmp_path}/run",
            "identity.prompts.categories=[shocking]",
            "identity.prompts.pairs_per_category=4",
            "identity.sampler.steps=2",
            "identity.dpo={steps: 5, warmup_steps: 1, pairs_per_step: 2, strategy: single}",
            "identity.experts.all_single=false",
            "execution.num_workers=1",
        ],
    )
    identity = run.config.identity
    pairs, folder = close_training_data(run)
    pictures = read_table(folder / "images.parquet", IMAGE_MANIFEST).slice(0, 6)
    arguments = {"base": identity.base.model_dump(), "sampler": identity.sampler.model_dump()}
    stage = PoolStage("pictures", IMAGES, "image_id", RenderWorker, arguments, batch_size=2)
    with scraping() as seen:
        with within(run="metered", stage="generate"):
            fill_pool(open_location(str(tmp_path / "pool")), pictures, stage, execution=run.config.execution)
            drawn = {"run": "metered", "stage": "generate", "work": "pictures"}
            assert wait_for(lambda: seen.of("safetydpo_done", **drawn) == 6, seconds=30), seen.highest
        assert seen.of("safetydpo_wanted", **drawn) == 6
        assert wait_for(lambda: seen.of("safetydpo_rows", **drawn) == 6, seconds=30), seen.highest
        with within(run="metered", stage="train"):
            train_experts(run, pairs, folder)
            trained = {"run": "metered", "stage": "train"}
            assert wait_for(lambda: seen.of("safetydpo_done", work=EXPERTS, **trained) == 1, seconds=30), seen.highest
        assert seen.of("safetydpo_done", work=LABEL, **trained) == 5
        assert wait_for(lambda: seen.of("safetydpo_training_pairs", **trained) == 10, seconds=30), seen.highest


def test_a_machine_without_a_gpu_tells_nothing_of_one():
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert gpu_utilisation() is None
