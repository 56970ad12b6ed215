"""Where everything lies: the one place that knows folder and file names."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from safetydpo.artifacts.storage import Location

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
INTERVENTION_FILE = "intervention.json"
RECORD_FILE = "record.json"
WINNERS_FILE = "winners.json"
OVERLAP_FILE = "overlap.json"
CARD_FILE = "README.md"
POINTERS_FILE = "artifacts.json"
IDENTITY_FILE = "identity.json"
PROMPT_PAIRS_FILE = "prompt_pairs.parquet"
MEMBERSHIPS_FILE = "memberships.parquet"
PROMPTS_FILE = "prompts.parquet"
WRITTEN_PROMPTS_FILE = "written_prompts.parquet"
PROMPT_REJECTS_FILE = "rejects.parquet"
WRITTEN_REPLIES_FILE = "replies.jsonl"
PICTURE_OUTCOMES_FILE = "outcomes.parquet"
CONCEPT_RATES_FILE = "concept_rates.parquet"
HELD_OUT_FOLDER = "ood"


def demo_weights() -> Path:
    """Return the folder of the demo model, its judges and reference features (package data)."""
    return Path(str(files("safetydpo"))) / "demo" / "weights"


def stage_folder(store: Location, stage: str) -> Location:
    """Return the folder of all artifacts of one stage."""
    return store / stage


def attempt_folder(folder: Location, number: int) -> Location:
    """Return where the files of one attempt at an artifact lie."""
    return folder / f"attempt-{number}"


def scratch_folder(store: Location, run_name: str) -> Location:
    """Return the folder of a run's working files: manifests, checkpoints of Ray Data, Ray's own state."""
    return store / "scratch" / run_name


def progress_file(run_dir: Location, stage: str) -> Location:
    """Return the file of what a run's stage tells of its progress."""
    return run_dir / "progress" / f"{stage}.json"


def merged_adapter_file(run_dir: Location) -> Location:
    """Return the file of the run's final adapter."""
    return run_dir / "merged" / ADAPTER_FILE


def summary_file(run_dir: Location) -> Location:
    """Return the file of the run's scores."""
    return run_dir / "report" / "summary.json"


def picture_outcomes_file(run_dir: Location) -> Location:
    """Return the file of what the run's scores were computed from, picture by picture."""
    return run_dir / "report" / PICTURE_OUTCOMES_FILE


def evidence_file(results: Location, row: str, seed: int) -> Location:
    """Return the file of one measured unit: a row of one seed; the colon of `expert:<category>` is no file name."""
    return results / f"{row.replace(':', '_')}-seed{seed}.json"


def concept_rates_file(run_dir: Location) -> Location:
    """Return the file of the run's rates per concept."""
    return run_dir / "report" / CONCEPT_RATES_FILE


def attack_sheet_file(run_dir: Location, row: str) -> Location:
    """Return the file with the pictures of base and a row under attack."""
    return run_dir / "attacks" / f"{row}.png"


def report_file(run_dir: Location) -> Location:
    """Return the file of the run's report page."""
    return run_dir / "report" / "index.html"


def redacted_report_file(run_dir: Location) -> Location:
    """Return the file of the run's report page without unsafe prompts and pictures."""
    return run_dir / "report" / "redacted.html"


def metrics_file(run_dir: Location, ending: Literal["csv", "parquet"]) -> Location:
    """Return the file of the run's scores in long form."""
    return run_dir / "report" / f"metrics.{ending}"


def report_record(run_dir: Location) -> Location:
    """Return the file that says what the run's report was made from; written last."""
    return run_dir / "report" / RECORD_FILE
