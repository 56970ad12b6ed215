"""What the files of a run take: the mean of what is there, else what can be said before."""

from __future__ import annotations

from collections.abc import Sequence

from ray_jobs.evaluate import outcomes_pool
from ray_jobs.expert_files import record_files
from ray_jobs.generate_pairs import latent_pool
from ray_jobs.places import image_pool
from ray_jobs.plan_evaluation import tuning_pictures
from ray_jobs.plan_work import Found, expert_steps
from safetydpo.artifacts.json_text import parse_object
from safetydpo.artifacts.layout import ADAPTER_FILE, RECORD_FILE
from safetydpo.artifacts.pool_index import DATA_FOLDER
from safetydpo.artifacts.storage import Location
from safetydpo.planning.estimate import StageWork, Stored

BYTES_PER_PIXEL = 3
SEEN, AT_MOST = "mean of what is there", "at most, if nothing is compressed"


def list_stored(found: Found, work: Sequence[StageWork]) -> list[Stored]:
    """Return pictures, latents, experts and test pictures of a run, with their bytes where they are known.

    Pictures by which comparators are tuned are judged and thrown away.
    """
    run, totals = found.run, {one.stage: one.total for one in work}
    is_here = found.is_model_here
    stored = [
        _pictures(found, "pictures of pairs", totals["pairs"], image_pool(run) if is_here else None),
        _rows("latents", totals["pairs"], latent_pool(run) if is_here else None),
    ]
    sizes = [(record_files(run, record) / ADAPTER_FILE).size_bytes() for record in found.experts.values()]
    each = sum(sizes) / len(sizes) if sizes else None
    stored.append(Stored("experts", len(expert_steps(found)), each, SEEN if sizes else ""))
    if "evaluate" in totals:
        pool = outcomes_pool(run) if is_here else None
        tuning, _ = tuning_pictures(run, {}, is_model_here=False)
        stored.append(_pictures(found, "test pictures", totals["evaluate"] - tuning, pool))
    return stored


def _pictures(found: Found, what: str, rows: int, pool: Location | None) -> Stored:
    sampler = found.run.config.identity.sampler
    seen = _rows(what, rows, pool)
    if seen.row_bytes is not None:
        return seen
    return Stored(what, rows, float(sampler.height * sampler.width * BYTES_PER_PIXEL), AT_MOST)


def _rows(what: str, rows: int, pool: Location | None) -> Stored:
    each = None if pool is None else mean_row_bytes(pool)
    return Stored(what, rows, each, "" if each is None else SEEN)


def mean_row_bytes(pool: Location) -> float | None:
    """Return the bytes of a row in the first closed batch that says how many it has; None if there is none."""
    for batch in pool.list():
        if not (batch / RECORD_FILE).is_file():
            continue
        rows = parse_object((batch / RECORD_FILE).read_bytes()).get("rows", 0)
        if rows:
            return sum(file.size_bytes() for file in (batch / DATA_FOLDER).walk()) / float(rows)
    return None
