"""The summary of a run, wherever it stands: its folder, the file itself, or a folder of measured units."""

from __future__ import annotations

from safetydpo.artifacts.layout import summary_file
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.evaluation.evidence import Unit, parse_unit, pool_units
from safetydpo.evaluation.summary import Summary, parse_summary


def read_summary(run: str) -> tuple[Summary, Location]:
    """Return the summary of a run and where it was read from.

    `run` is a run folder, a `summary.json`, or a folder of what `safetydpo evidence` measured, whose seeds are pooled;
    local or `s3://`.

    Raises:
        UsageError: if none of them stands there.
        SafetyDPOError: if what stands there is broken.
    """
    place = open_location(run)
    if place.is_file():
        return _parse(place), place
    if not place.is_folder():
        raise UsageError(f"expected a run folder or a summary.json at {place}, found nothing: name one that is there")
    file = summary_file(place)
    if file.is_file():
        return _parse(file), file
    units = [found for found in place.list() if found.name.endswith(".json") and "-seed" in found.name]
    if not units:
        raise UsageError(
            f"expected {file} in the run folder {place}, found none: finish the run with `safetydpo report CONFIG`, or "
            "name another one"
        )
    return _pool([parse_unit(_text(found), source=str(found)) for found in units]), place


def _parse(place: Location) -> Summary:
    try:
        return parse_summary(_text(place))
    except SafetyDPOError as error:
        raise SafetyDPOError(f"{place}: {error}") from error


def _text(place: Location) -> str:
    try:
        return place.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SafetyDPOError(
            f"expected UTF-8 text in {place}, found byte {error.object[error.start]:#04x} at {error.start}: evaluate "
            "the run again"
        ) from error


def _pool(units: list[Unit]) -> Summary:
    rows = dict.fromkeys(unit.row for unit in units)
    seeds = sorted({unit.seed for unit in units})
    return pool_units(units, rows=list(rows), seeds=seeds).summary
