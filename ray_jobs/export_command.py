"""What `safetydpo export-pairs` does: find a run's closed pairs and write them as a data set. Needs no Ray."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ray_jobs.places import image_pool_of
from ray_jobs.run import Run, with_absolute_paths
from safetydpo.artifacts.layout import IDENTITY_FILE
from safetydpo.artifacts.records import Record, check_run_identity, read_pointers, read_record
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.load import identity_of, load_config
from safetydpo.errors import SafetyDPOError, UsageError


def export_pairs(
    config: Path,
    settings: list[str],
    *,
    out: str,
    layout: str,
    with_pictures: bool,
    name: str | None,
    licence: str,
) -> None:
    """Write the kept pairs of the run of `config` to `out` and say what was written.

    Raises:
        UsageError: if something stands at `out`, the run has another config, or layout or licence are unknown words.
        SafetyDPOError: if the run has no closed pairs, or its files are missing or broken.
    """
    from ray_jobs.terminal import TextConsole
    from safetydpo.pairs.dataset_card import card_facts, check_licence, render_card
    from safetydpo.pairs.export import Layout, describe_columns, refuse_existing, write_dataset
    from safetydpo.pairs.kept import read_kept_pairs
    from safetydpo.pairs.stored_pictures import PictureIndex

    if layout not in list(Layout):
        raise UsageError(f"expected --layout {' or '.join(Layout)}, found {layout!r}")
    check_licence(licence)
    run = Run(with_absolute_paths(load_config(config, settings)))
    target = open_location(out)
    for location in (run.store, run.run_dir, target):
        location.check_reachable()
    refuse_existing(target)
    folder, record = find_pairs(run)
    if "given" in record.details:
        raise UsageError(
            f"expected pairs that this run has drawn, found imported ones ({record.details['given']['folder']}): "
            "hand on the files that they were imported from"
        )
    kept = read_kept_pairs(folder)
    pictures = PictureIndex(image_pool_of(run.store, record)) if with_pictures else None
    facts = card_facts(
        record,
        name=name or f"{run.config.name}-pairs",
        licence=licence,
        with_pictures=with_pictures,
        # The arguments name places, never credentials: those stand in the environment.
        command=shlex.join(["safetydpo", *sys.argv[1:]]),
    )
    columns = describe_columns(Layout(layout), with_pictures=with_pictures, is_edited=facts.edit is not None)
    card = render_card(facts, kept.counts, columns)
    num_shards = write_dataset(target, kept, pictures, layout=Layout(layout), card=card)
    # A log file has no width of its own; 80 columns would fold the paths.
    console = TextConsole(highlight=False, soft_wrap=True)
    counts = kept.counts
    total = counts.kept + counts.dropped
    console.print(f"{counts.kept} kept pairs of {total} are in {target.shown}, shards: {num_shards}")
    for group in counts.by_category:
        console.print(f"  {group.name:<20} {group.kept:>7} kept {group.dropped:>7} dropped")


def find_pairs(run: Run) -> tuple[Location, Record]:
    """Return folder and record of the pairs that the run's last `safetydpo pairs` has closed.

    Raises:
        UsageError: if the run folder belongs to another config.
        SafetyDPOError: if there are none.
    """
    pointer = read_pointers(run.run_dir).get("pairs")
    if pointer is not None and (run.run_dir / IDENTITY_FILE).is_file():
        check_run_identity(run.run_dir, identity_of(run.config))
    folder = None if pointer is None else run.store / pointer["stage"] / pointer["folder"]
    record = None if folder is None else read_record(folder)
    if folder is None or record is None:
        where = f"{run.run_dir}" if folder is None else f"{folder}"
        raise SafetyDPOError(
            f"expected the closed pairs of run {run.config.name!r}, found none in {where}: run `safetydpo pairs` with "
            "the same config first"
        )
    return folder, record
