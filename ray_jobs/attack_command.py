"""What `safetydpo attack` does: make attack prompts, draw them with base and adapters, show what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs.attack_prompts import check_attacks, make_attack_prompts, read_attack_prompts
from ray_jobs.evaluate import EvaluatedRow, evaluate_rows
from ray_jobs.run import Run, with_absolute_paths
from ray_jobs.terminal import output_console
from safetydpo.artifacts.layout import ADAPTER_FILE, attack_sheet_file, merged_adapter_file
from safetydpo.artifacts.storage import Location, open_location
from safetydpo.config.load import load_config
from safetydpo.config.schema import Config
from safetydpo.errors import UsageError
from safetydpo.evaluation.attack_metrics import ATTACK_PREFIX, ATTACK_SETS, attack_metrics
from safetydpo.evaluation.metrics import Metric
from safetydpo.evaluation.outcomes import ImageOutcome
from safetydpo.evaluation.rows import RowSource, to_record
from safetydpo.seeding import derive_numpy

SEARCHED = "searched"
"""Name of the adapter that `white_box` attacks."""
POINTER = "attack_outcomes"
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Shown:
    """The outcomes of the rows, by row, and the pictures behind them."""

    outcomes: Mapping[str, Sequence[ImageOutcome]]
    pictures: Mapping[Key, bytes | None]


def show_attacks(config: Path, settings: Sequence[str], *, adapters: Sequence[str], show_unsafe: bool) -> None:
    """Make or find a run's attack prompts, draw them with the base and each adapter, and print what came of it.

    Raises:
        UsageError: if no attack is asked for, an adapter is not given as NAME=FOLDER, or the settings refuse it.
        SafetyDPOError: if an adapter's file is missing or broken.
    """
    from ray_jobs.cluster import disconnect

    loaded = load_config(config, list(settings))
    _check(loaded)
    run = Run(with_absolute_paths(loaded))
    for location in (run.store, run.run_dir):
        location.check_reachable()
    folders = _adapter_folders(run, adapters)
    rows = [_row(run, "base", None), *(_row(run, name, folder) for name, folder in folders.items())]
    run.open()
    attacked = next((row for row in rows if row.source.name == SEARCHED), None)
    try:
        adapter = None if attacked is None else (str(attacked.source.adapter_hash), attacked.adapter)
        make_attack_prompts(run, adapter=adapter)
        shown = _draw(run, rows)
    finally:
        disconnect()
    console = output_console(highlight=False)
    console.print(_prompt_table(run, shown))
    console.print(_rate_table(run, shown))
    for name in folders:
        file = attack_sheet_file(run.run_dir, name)
        file.write_bytes(_sheet(run, shown, name, show_unsafe=show_unsafe))
        console.print(f"pictures  {file.shown}", soft_wrap=True)


def _check(config: Config) -> None:
    from safetydpo.judges.build import DEMO_SIDE

    identity = config.identity
    if not identity.evaluation.attacks:
        raise UsageError(
            "expected attacks in identity.evaluation.attacks, found none: name some, such as "
            "identity.evaluation.attacks='[paraphrase, typo, optimised]'"
        )
    check_attacks(identity)
    sampler = identity.sampler
    if (sampler.height, sampler.width) != (DEMO_SIDE, DEMO_SIDE):
        raise UsageError(
            f"expected pictures of {DEMO_SIDE} x {DEMO_SIDE} (identity.sampler), which the demo's judges know, found "
            f"{sampler.height} x {sampler.width}"
        )


def _adapter_folders(run: Run, adapters: Sequence[str]) -> dict[str, Location]:
    found: dict[str, Location] = {}
    for text in adapters:
        name, separator, folder = text.partition("=")
        if not (name.isidentifier() and separator and folder) or name in found or name == "base":
            raise UsageError(
                f"expected --adapter NAME=FOLDER with a name of its own, found {text!r}: such as "
                f"{SEARCHED}=runs/demo/merged"
            )
        found[name] = open_location(folder)
    if not found and merged_adapter_file(run.run_dir).is_file():
        found[SEARCHED] = merged_adapter_file(run.run_dir).parent
    return found


def _row(run: Run, name: str, folder: Location | None) -> EvaluatedRow:
    from safetydpo.artifacts.adapters import adapter_hash, read_adapter

    sets = tuple(f"{ATTACK_PREFIX}{attack}" for attack in run.config.identity.evaluation.attacks)
    if folder is None:
        return EvaluatedRow(RowSource(name, "base"), "", sets)
    layers, _ = read_adapter(folder / ADAPTER_FILE)
    source = RowSource(name, "merged", adapter_hash=adapter_hash(layers))
    return EvaluatedRow(source, folder.path, sets)


def _draw(run: Run, rows: Sequence[EvaluatedRow]) -> Shown:
    from ray_jobs.outcomes import read_outcomes

    joined = read_outcomes(run, evaluate_rows(run, rows, pointer=POINTER), rows)
    by_row: dict[str, list[ImageOutcome]] = {row.source.name: [] for row in rows}
    for outcome in joined.outcomes:
        by_row[outcome.row_name].append(outcome)
    shown = [(row, one.prompt_id, one.seed) for row, outcomes in by_row.items() for one in outcomes]
    return Shown(by_row, joined.pictures.read(shown))


def _prompt_table(run: Run, shown: Shown) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Attack prompts; ! = the audit judge sees an unsafe concept", title_justify="left", box=box.SIMPLE
    )
    for column in ("attack", "concept", "prompt", "distance", *shown.outcomes):
        table.add_column(column, overflow="fold")
    seed = run.config.identity.evaluation.seeds[0]
    verdicts: dict[tuple[str, str, str, str], bool] = {
        (name, o.prompt_set, o.concept, o.text): _is_unsafe(o)
        for name, outcomes in shown.outcomes.items()
        for o in outcomes
        if o.seed == seed
    }
    for row in read_attack_prompts(run):
        key = (f"{ATTACK_PREFIX}{row['attack']}", row["concept"], row["text"])
        marks = ["!" if verdicts[name, *key] else "" for name in shown.outcomes]
        distance = "" if row["attack"] == "random" else f"{row['loss']:.3f} of {row['start_loss']:.3f}"
        table.add_row(row["attack"], row["concept"], row["text"], distance, *marks)
    return table


def _is_unsafe(outcome: ImageOutcome) -> bool:
    return outcome.failure is not None or outcome.verdicts["audit"].unsafe


def _rate_table(run: Run, shown: Shown) -> Any:
    from rich import box
    from rich.table import Table

    from safetydpo.evaluation.results import format_metric

    table = Table(title="Attack success, audit judge", title_justify="left", box=box.SIMPLE)
    for column in ("attack", "row", "n", "success [95 %]", "over concepts", "minus base", "where base", "n", "mush"):
        table.add_column(column, justify="left" if column in ("attack", "row") else "right", no_wrap=True)
    for attack in run.config.identity.evaluation.attacks:
        for name, outcomes in shown.outcomes.items():
            generator = derive_numpy(run.config.identity.seed, "evaluate.attacks", name)
            base = None if name == "base" else shown.outcomes["base"]
            metrics = attack_metrics(outcomes, base=base, generator=generator)
            rate = metrics[f"attack_ip:{attack}"]
            where = metrics.get(f"attack_ip_where_base:{attack}")
            table.add_row(
                attack,
                name,
                str(rate.n),
                format_metric(to_record(rate)),
                _over_concepts(rate),
                _formatted(metrics.get(f"attack_ip_minus_base:{attack}")),
                _formatted(where),
                "" if where is None else str(where.n),
                f"{metrics[f'attack_unrecognisable_rate:{attack}'].value:.2f}",
            )
    return table


def _formatted(metric: Metric | None) -> str:
    from safetydpo.evaluation.results import format_metric

    return "" if metric is None else format_metric(to_record(metric))


def _over_concepts(rate: Metric) -> str:
    return "" if rate.cluster_low is None else f"[{rate.cluster_low:.2f}, {rate.cluster_high:.2f}]"


def _sheet(run: Run, shown: Shown, name: str, *, show_unsafe: bool) -> bytes:
    import torch

    from safetydpo.diffusion.contact_sheet import SheetBlock, SheetRow, draw_sheet
    from safetydpo.diffusion.pictures import decode_picture, encode_picture

    side = run.config.identity.sampler.height
    blank = torch.zeros(side, side, 3, dtype=torch.uint8)

    def picture(row: str, outcome: ImageOutcome) -> Any:
        data = shown.pictures[row, outcome.prompt_id, outcome.seed]
        return blank if data is None else torch.from_numpy(decode_picture(data))

    blocks = []
    for attack in run.config.identity.evaluation.attacks:
        lines = []
        for before, now in zip(shown.outcomes["base"], shown.outcomes[name], strict=True):
            if before.prompt_set == ATTACK_SETS[attack]:
                veils = [_is_unsafe(outcome) and not show_unsafe for outcome in (before, now)]
                lines.append(SheetRow(picture("base", before), picture(name, now), *veils))
        blocks.append(SheetBlock(attack, lines))
    return encode_picture(draw_sheet(blocks, title=f"attacks: base and {name}"))
