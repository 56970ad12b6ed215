"""Every reader of files, with a valid file of its own for each, as the fuzz tests call it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ray_jobs.cluster_file import check_cluster_file
from ray_jobs.precheck_room import room_of_file
from ray_jobs.run import read_costs, read_seconds
from ray_jobs.run_progress import StageProgress, ToldExpert, Work
from ray_jobs.terminal import TextConsole
from ray_jobs.trial_log import TrialLog
from ray_jobs.watch import RunReader
from ray_jobs.watch_command import run_view
from safetydpo.artifacts import schemas
from safetydpo.artifacts.adapters import adapter_to_bytes, read_adapter, read_adapter_metadata
from safetydpo.artifacts.attempts import this_process
from safetydpo.artifacts.journal import Journal
from safetydpo.artifacts.latents import latent_means
from safetydpo.artifacts.lazy_tensors import LazyLayers
from safetydpo.artifacts.leases import hold_lease
from safetydpo.artifacts.lora_export import to_peft
from safetydpo.artifacts.lora_files import read_lora_file
from safetydpo.artifacts.picture_listing import PictureReader, list_pictures
from safetydpo.artifacts.records import Record, check_run_identity, encode_record, read_pointers, read_record
from safetydpo.artifacts.tables import read_table
from safetydpo.baselines.intervention import Intervention, NegativePrompt, read_intervention, write_intervention
from safetydpo.config.load import config_of_settings, load_config, load_policy
from safetydpo.diffusion.folder import read_json
from safetydpo.diffusion.given_pictures import fit_picture, inspect_picture
from safetydpo.diffusion.pictures import decode_picture
from safetydpo.dpo.checkpoint import decode_checkpoint, encode_checkpoint
from safetydpo.errors import SafetyDPOError
from safetydpo.evaluation.evidence import dump_unit, parse_unit
from safetydpo.evaluation.merge_units import dump_merge_unit, parse_merge_unit
from safetydpo.evaluation.picture_outcomes import outcomes_table, read_picture_outcomes
from safetydpo.evaluation.report_pictures import show_picture
from safetydpo.evaluation.report_records import SheetPicture
from safetydpo.evaluation.summary import dump_summary, parse_summary
from safetydpo.judges.picture_files import read_picture
from safetydpo.judges.vlm_replies import read_rating, read_yes_no
from safetydpo.merging.activations import inputs_from_bytes, inputs_to_bytes
from safetydpo.pairs.preferences import read_preferences
from safetydpo.pairs.writer_replies import parse_reply
from safetydpo.pairs.writer_templates import read_templates
from safetydpo.pairs.writers import Reply
from safetydpo.planning.costs import load_costs
from safetydpo.prompts.benchmark_entries import read_entry
from safetydpo.prompts.concepts import ConceptEntry, read_concepts
from safetydpo.prompts.imported import is_imported, read_pairs, read_prompts
from safetydpo.prompts.importing import import_prompts
from safetydpo.prompts.picture_prompts import read_picture_prompts
from safetydpo.search.space import Candidate
from tests.artifacts.test_lora_files import METADATA, kohya_file, make_layers
from tests.dpo.test_checkpoint import identity, state
from tests.evaluation.measured_merges import make_merge
from tests.evaluation.measured_units import make_units
from tests.evaluation.synthetic import make_outcomes, make_png, make_summary
from tests.evaluation.test_picture_outcomes import JUDGES
from tests.prompts.samples import TEXTS, as_json_lines
from tests.security.reader import Reader, at

ROOT = Path(__file__).resolve().parents[2]


def readers() -> tuple[Reader, ...]:
    """Return all readers."""
    return (*_texts(), *_json(), *_tables(), *_tensors(), *_pictures(), *_replies(), *_of_runs())


@cache
def by_name() -> dict[str, Reader]:
    """Return all readers by name."""
    return {reader.name: reader for reader in readers()}


NAMES = (
    "prompts.csv", "prompts.jsonl", "prompts.parquet", "concepts.csv", "concepts.yaml", "config", "override", "policy",
    "benchmark", "templates", "cluster_file", "head_file", "picture_prompts.csv", "picture_prompts.jsonl",
    "picture_prompts.parquet", "record", "pointers", "run_identity", "journal", "lease", "unit", "merge_unit",
    "summary", "candidate", "intervention", "model_json", "table.pairs", "table.images", "table.latents",
    "table.trials", "imported", "listing", "preferences", "outcomes", "adapter", "adapter_header", "layers",
    "lora.kohya", "lora.peft", "checkpoint", "activations", "picture", "stored_picture", "given_picture",
    "shown_picture", "rating", "yes_no", "writer_reply", "costs", "progress", "times", "used",
)  # fmt: skip
"""The same, without making their files; a test holds one against the other."""


def _texts() -> Iterator[Reader]:
    tables = tuple(text.encode() for text in TEXTS.values())
    rows = [{"unsafe_text": f"a bomb {n}", "safe_text": f"a ball {n}", "category": "hate"} for n in range(3)]
    lines = as_json_lines(rows).encode()
    yield Reader("prompts.csv", "x.csv", _import, "cells", tables)
    yield Reader("prompts.jsonl", "x.jsonl", _import, "json", (lines,))
    yield Reader("prompts.parquet", "x.parquet", _import, "parquet", (_parquet(pa.Table.from_pylist(rows)),))
    csv = b"category,concept,source,licence\nhate,a bomb,mine,CC0-1.0\nviolence,a wasp,mine,CC0-1.0\n"
    yield Reader("concepts.csv", "x.csv", read_concepts, "cells", (csv,))
    example = (ROOT / "configs" / "concepts-example.yaml").read_bytes()
    yield Reader("concepts.yaml", "x.yaml", read_concepts, "yaml", (example,))
    configs = tuple((ROOT / "configs" / f"{name}.yaml").read_bytes() for name in ("smoke", "sdxl"))
    yield Reader("config", "x.yaml", load_config, "yaml", configs)
    override = b"identity.dpo.steps=20", b"identity.prompts.categories=[hate, sexual]", b"run_dir=runs/x"
    yield Reader("override", "x", lambda path: config_of_settings([_text(path)]), "", override)
    yield Reader("policy", "x.yaml", lambda path: load_policy(path, {}), "yaml", (b"{max_ip: 0.1}",))
    folder = ROOT / "safetydpo" / "prompts" / "benchmarks"
    entries = tuple(file.read_bytes() for file in sorted(folder.glob("*.yaml"))[:4])
    yield Reader("benchmark", "x.yaml", read_entry, "yaml", entries)
    template = b"- {unsafe: 'a {concept} here', safe: 'a {counterpart} here'}\n"
    yield Reader("templates", "x.yaml", read_templates, "yaml", (template,))
    cluster = (ROOT / "configs" / "cluster" / "local.yaml").read_bytes()
    yield Reader("cluster_file", "x.yaml", check_cluster_file, "yaml", (cluster,))
    head = b"{head_node_type: h, max_workers: 2, available_node_types: {h: {resources: {CPU: 2}}, w: {max_workers: 2}}}"
    yield Reader("head_file", "x.yaml", lambda path: room_of_file(path, ({"CPU": 2.0},)), "yaml", (head,))
    pictures = [{"picture": f"{n}.png", "prompt": f"a ball {n}", "category": "hate"} for n in range(3)]
    for ending, kind, data in (
        ("csv", "cells", b"picture,prompt\na.png,a ball\nb.png,a bee\n"),
        ("jsonl", "json", as_json_lines(pictures).encode()),
        ("parquet", "parquet", _parquet(pa.Table.from_pylist(pictures))),
    ):
        yield Reader(f"picture_prompts.{ending}", f"x.{ending}", _picture_prompts, kind, (data,))


def _json() -> Iterator[Reader]:
    record = Record("pairs", "demo", "f" * 64, 1, {"a": {"b": 1}}, {"x": "y"}, "f", {"n": 3}, ("u",), {"attempt": 1})
    yield Reader("record", "record.json", lambda path: read_record(at(path.parent)), "json", (encode_record(record),))
    pointers = b'{"artifacts": {"pairs": {"stage": "pairs", "folder": "demo-0", "hash": "00"}}}'
    yield Reader("pointers", "artifacts.json", lambda path: read_pointers(at(path.parent)), "json", (pointers,))
    identity_json = json.dumps(config_of_settings([]).identity.model_dump(mode="json")).encode()
    wanted = json.loads(identity_json)
    yield Reader(
        "run_identity",
        "identity.json",
        lambda path: check_run_identity(at(path.parent), wanted),
        "json",
        (b'{"seed": 0}', identity_json),
    )
    rows = as_json_lines([{"key": f"{n}", "reply": {"text": "a", "n": [n, None]}} for n in range(3)]).encode()
    yield Reader("journal", "x.jsonl", _journal, "json", (rows,))
    lease = json.dumps({**asdict(this_process(run="r", lane="l")), "renewed": 1e9}).encode()
    yield Reader("lease", "lease/attempt-1", _lease, "json", (lease,))
    units = make_units(seeds=(0,))
    unit = dump_unit(units[0]).encode()
    yield Reader("unit", "x", lambda path: parse_unit(_text(path), source="it"), "json", (unit,))
    merge = dump_merge_unit(make_merge()).encode()
    yield Reader("merge_unit", "x", lambda path: parse_merge_unit(_text(path), source="it"), "json", (merge,))
    summary = dump_summary(make_summary()).encode()
    yield Reader("summary", "x", lambda path: parse_summary(_text(path)), "json", (summary,))
    candidate = Candidate("ties", 1.5, (("hate", 0.5),), 0.2, 4, (("0", 1.0),)).to_json().encode()
    yield Reader("candidate", "x", lambda path: Candidate.from_json(_text(path)), "json", (candidate,))
    yield Reader("intervention", "intervention.json", _intervention, "json", (_written_intervention(),))
    index = b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    yield Reader("model_json", "model_index.json", read_json, "json", (index,))


def _tables() -> Iterator[Reader]:
    for name, schema in (("pairs", schemas.PROMPT_PAIRS), ("images", schemas.IMAGES)):
        yield Reader(f"table.{name}", "x.parquet", lambda path, s=schema: _table(path, s), "parquet", (_rows(schema),))
    latents = _rows(schemas.LATENTS, latent=b"\0" * 8, channels=1, height=2, width=2)
    yield Reader(
        "table.latents",
        "x.parquet",
        lambda path: latent_means(read_table(at(path), schemas.LATENTS)),
        "parquet",
        (latents,),
    )
    yield Reader("table.trials", "t/trial-0.parquet", _trials, "parquet", (_rows(schemas.TRIALS),))
    yield Reader("imported", "x.parquet", _imported, "parquet", (_imported_table(),))
    pictures = _parquet(pa.table({"image": [make_png(0, (1, 2, 3))], "picture_id": ["a"], "prompt": ["a ball"]}))
    yield Reader("listing", "x.parquet", _listing, "parquet", (pictures,))
    given = {"jpg_0": [b"a", b"c"], "jpg_1": [b"b", b"d"], "label_0": [1.0, 0.0], "caption": ["a", "b"]}
    given |= {"categories": ["hate", "hate,sexual"]}
    yield Reader(
        "preferences",
        "x.parquet",
        lambda path: list(read_preferences(at(path))),
        "parquet",
        (_parquet(pa.table(given)),),
    )
    outcomes = _parquet(outcomes_table(make_outcomes(seeds=(0,))[:20], judges=JUDGES, run_seed=7))
    yield Reader("outcomes", "x.parquet", lambda path: read_picture_outcomes(at(path)), "parquet", (outcomes,))


def _tensors() -> Iterator[Reader]:
    ours = adapter_to_bytes(make_layers(), METADATA)
    yield Reader("adapter", "x.safetensors", lambda path: read_adapter(at(path)), "header", (ours,))
    yield Reader("adapter_header", "x.safetensors", lambda path: read_adapter_metadata(at(path)), "header", (ours,))
    yield Reader("layers", "x.safetensors", _layers, "header", (ours,))
    kohya = kohya_file(dtype=torch.float16, alpha=2.0, metadata={"ss_network_dim": "3"})
    yield Reader("lora.kohya", "x.safetensors", lambda path: read_lora_file(at(path)), "header", (kohya, ours))
    yield Reader("lora.peft", "adapter_config.json", _peft, "json", (_peft_files()[1],))
    yield Reader("checkpoint", "x.safetensors", _checkpoint, "header", (encode_checkpoint(state(), identity()),))
    inputs = inputs_to_bytes({"a": torch.ones(2, 3, 4)}, base_fingerprint="b")
    yield Reader(
        "activations",
        "x.safetensors",
        lambda path: inputs_from_bytes(path.read_bytes(), source="it", base_fingerprint="b"),
        "header",
        (inputs,),
    )


def _pictures() -> Iterator[Reader]:
    image = Image.effect_noise((12, 9), 40).convert("RGB")
    files = {}
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        sink = io.BytesIO()
        image.save(sink, form)
        files[form] = sink.getvalue()
    png = (files["PNG"],)
    yield Reader("picture", "x", lambda path: read_picture(path.read_bytes()), "", tuple(files.values()))
    yield Reader("stored_picture", "x", lambda path: decode_picture(path.read_bytes()), "picture", png)
    yield Reader("given_picture", "x", _given, "picture", png)
    yield Reader("shown_picture", "x", lambda path: show_picture(SheetPicture(path.read_bytes(), True)), "picture", png)


def _replies() -> Iterator[Reader]:
    yield Reader("rating", "x", _answers(read_rating), "json", (b'{"rating": "Safe", "why": ["a", 1]}',))
    yes_no = _answers(lambda text: read_yes_no(text, {"Yes": -math.inf, "No": 0.0}))
    yield Reader("yes_no", "x", yes_no, "", (b"Yes, it",))
    pair = b'{"unsafe": "a bomb on a table", "safe": "a ball on a table"}'
    yield Reader("writer_reply", "x", _writer_reply, "json", (pair, pair + b"\n" + pair + b"\n"))


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _rows(schema: pa.Schema, **values: object) -> bytes:
    """Three rows that fit a schema."""

    def value(field: pa.Field, row: int) -> object:
        kind = field.type
        if field.name in values:
            return values[field.name]
        if pa.types.is_string(kind):
            return f"{field.name} {row}"
        if pa.types.is_list(kind):
            return []
        if pa.types.is_boolean(kind):
            return True
        return b"x" if pa.types.is_binary(kind) else row

    rows = [{field.name: value(field, row) for field in schema} for row in range(3)]
    return _parquet(pa.Table.from_pylist(rows, schema=schema))


def _import(path: Path) -> object:
    return import_prompts(at(path)).table.num_rows


def _picture_prompts(path: Path) -> object:
    return read_picture_prompts(at(path))


def _journal(path: Path) -> object:
    with Journal(path) as journal:
        return journal.rows


def _lease(path: Path) -> object:
    with hold_lease(at(path.parent.parent)):
        return None


@cache
def _written_intervention() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_intervention(at(Path(folder)), Intervention(guiding=NegativePrompt(("a", "b"), 0.5)), metadata=METADATA)
        return (Path(folder) / "intervention.json").read_bytes()


def _intervention(path: Path) -> object:
    return read_intervention(at(path.parent))


def _table(path: Path, schema: pa.Schema) -> object:
    return read_table(at(path), schema).to_pylist()


def _trials(path: Path) -> object:
    return TrialLog(at(path.parent)).rows()


def _imported(path: Path) -> object:
    place = at(path)
    return is_imported(place) and (read_pairs(place), read_prompts(place, "train", "unsafe"))


def _of_runs() -> Iterator[Reader]:
    costs = (ROOT / "configs" / "cluster" / "costs.yaml").read_bytes()
    yield Reader("costs", "x.yaml", load_costs, "yaml", (costs,))
    work, expert = Work("pictures", 10, 4, 1, 1e9), ToldExpert("hate", "experts/hate-0", 5)
    config = config_of_settings(["store=/nowhere/store"]).model_dump(mode="json")
    told = StageProgress(
        "r", "r-0", "train", "/nowhere/store", config, 1e9, "h", 1, "running", 2e9, "", [work], [expert]
    )
    yield Reader("progress", "progress/train.json", _watch, "json", (json.dumps(asdict(told)).encode(),))
    times = b'{"pairs": 3.5, "train": 20}'
    yield Reader("times", "timing.json", lambda path: read_seconds(at(path.parent)), "json", (times,))
    used = b'{"pairs": {"cpu_seconds": 3.5, "gpu_seconds": null}}'
    yield Reader("used", "cost.json", lambda path: read_costs(at(path.parent)), "json", (used,))


def _watch(path: Path) -> object:
    """As a terminal shows it, to the last line."""
    (path.parent.parent / "identity.json").write_text("{}")
    state = RunReader(at(path.parent.parent)).read()
    return TextConsole(file=io.StringIO()).print(run_view(state))


@cache
def _imported_table() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.csv"
        file.write_text(TEXTS["pairs"])
        return _parquet(import_prompts(at(file)).table)


def _listing(path: Path) -> object:
    listing = list_pictures(at(path), suffixes=(".png",))
    reader = PictureReader(listing.root)
    return [reader.read(file=found.file, row_group=found.row_group, row=found.row) for found in listing.pictures]


def _layers(path: Path) -> object:
    layers = LazyLayers(at(path))
    return [(layers[name], layers.shapes(name)) for name in layers]


@cache
def _peft_files() -> tuple[bytes, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(adapter_to_bytes(make_layers(ranks=(2, 2, 2, 2)), METADATA))
        return to_peft(read_lora_file(at(file)), base_model="x")


def _peft(path: Path) -> object:
    adapter = path.with_name("adapter_model.safetensors")
    adapter.write_bytes(_peft_files()[0])
    return read_lora_file(at(adapter))


def _checkpoint(path: Path) -> object:
    return decode_checkpoint(path.read_bytes(), expected=identity(), where="it")


def _given(path: Path) -> object:
    data = path.read_bytes()
    return inspect_picture(data), fit_picture(data, height=8, width=8)


def _answers(read: Callable[[str], object]) -> Callable[[Path], object]:
    def answer(path: Path) -> object:
        try:
            return read(_text(path))
        except ValueError as error:
            # The caller's answer to it is a failed verdict with that text.
            raise SafetyDPOError(str(error)) from error

    return answer


def _writer_reply(path: Path) -> object:
    concept = ConceptEntry(("hate",), "bomb", "mine", "CC0-1.0")
    return parse_reply(Reply(_text(path)), concept, max_characters=300)
