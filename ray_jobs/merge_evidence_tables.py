"""The tables and plots of measured merges, written from their records alone."""

from __future__ import annotations

import os
from pathlib import Path

from ray_jobs.merge_evidence_plan import plan_merges
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.evaluation.evidence_page import replace_marked
from safetydpo.evaluation.merge_page import MARKS, Measured, merge_page, merge_short_page


def write_merge_tables(config: Config) -> list[str]:
    """Write plots and tables of all units that stand, of this identity, into folder and pages; return their names.

    Nothing is written while no unit stands.

    Raises:
        UsageError: if a page is missing.
        SafetyDPOError: if a page lacks its marks.
    """
    from safetydpo.evaluation.merge_plots import draw_plots

    settings = config.merge_evidence
    planned = plan_merges(config)
    units = [unit for one in planned if (unit := one.read()) is not None]
    if not units:
        return []
    measured = Measured(
        units=units,
        num_planned=len(planned),
        retention=settings.retention,
        screen_count=settings.screen_count,
        counts=settings.counts,
        factor_counts=settings.factor_counts,
        methods=settings.methods,
        first_seed=settings.seeds[0],
    )
    images: list[tuple[str, str]] = []
    if settings.images is not None:
        for name, (data, description) in draw_plots(measured).items():
            (open_location(settings.images) / name).write_bytes(data)
            images.append((str(Path(settings.images) / name), description))
    written = []
    for location, page, is_short in marked_pages(config):
        folder = Path(page).parent
        if is_short:
            link = None if settings.page is None else os.path.relpath(settings.page, folder)
            text = merge_short_page(measured, link=link)
        else:
            text = merge_page(measured, images=[(os.path.relpath(path, folder), alt) for path, alt in images])
        old = location.read_bytes().decode()
        location.write_bytes(replace_marked(old, text, source=str(location), marks=MARKS).encode())
        written.append(page)
    return written


def marked_pages(config: Config) -> list[tuple[Location, str, bool]]:
    """Return (place, name, whether short) of each page of `merge_evidence`.

    Raises:
        UsageError: if one is missing.
        SafetyDPOError: if one lacks its marks.
    """
    settings, pages = config.merge_evidence, []
    for setting, page in (("page", settings.page), ("short_page", settings.short_page)):
        if page is None:
            continue
        location = open_location(page)
        if not location.is_file():
            raise UsageError(
                f"expected a page at {location} (merge_evidence.{setting}), found none: create it with its marks"
            )
        replace_marked(location.read_bytes().decode(), "", source=str(location), marks=MARKS)
        pages.append((location, page, setting == "short_page"))
    return pages
