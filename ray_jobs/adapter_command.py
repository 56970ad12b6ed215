"""`safetydpo adapter`: what a LoRA file is, and the same adapter as other programs want it. No Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_jobs.terminal import output_console
from safetydpo.errors import SafetyDPOError, UsageError

if TYPE_CHECKING:
    from safetydpo.artifacts.lora_files import LoraFile
    from safetydpo.artifacts.storage import Location

app = typer.Typer(
    name="adapter",
    help="Look into a LoRA file of any origin; write it for ComfyUI, A1111, diffusers, PEFT, or into its model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
LARGEST_SHOWN = 40
TARGETS = ("kohya", "diffusers", "peft", "full")
AdapterFile = Annotated[
    str, typer.Argument(help="A .safetensors file: local path or s3:// address.", show_default=False)
]


@app.command()
def inspect(
    file: AdapterFile,
    every_layer: Annotated[bool, typer.Option("--all", help=f"Every layer, not the {LARGEST_SHOWN} largest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object.")] = False,
) -> None:
    """Print what FILE says of itself, the norm and rank of each layer, and what each expert supplied."""
    from safetydpo.artifacts.lora_files import read_lora_file
    from safetydpo.artifacts.storage import open_location

    location = open_location(file)
    description = describe(read_lora_file(location), location)
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = output_console(highlight=False)
    print_description(console, description, shown=None if every_layer else LARGEST_SHOWN)


def describe(file: LoraFile, location: Location) -> dict[str, Any]:
    """Return all that is known of a LoRA file as JSON values; what it does not say is None and in `unknown`."""
    from safetydpo.artifacts.adapters import adapter_hash
    from safetydpo.merging.overlap import delta_norm

    metadata = file.metadata
    is_ours = bool(metadata.training_hash or metadata.base_fingerprint or metadata.recipe)
    own_hash = adapter_hash(_modules(file))
    recipe = dict(metadata.recipe)
    shares = recipe.pop("shares", None) or _recorded_shares(location, own_hash)
    layers = [
        {
            "layer": name,
            "kind": "linear" if layer.down.ndim == 2 else "conv {}x{}".format(*layer.down.shape[2:]),
            "rank": int(layer.down.shape[0]),
            "scale": file.scales[name],
            "norm": delta_norm(layer),
        }
        for name, layer in file.layers.items()
    ]
    facts = {
        "base model": metadata.base_model or None,
        "fingerprint of the base": metadata.base_fingerprint or None,
        "licence": metadata.licence or None,
        "kind": metadata.kind if is_ours else None,
        "categories": ", ".join(metadata.categories) or None,
        "made by (hash)": metadata.training_hash or None,
    }
    return {
        "file": location.shown,
        "format": file.format,
        "dtype": file.dtype,
        # Of the file's own layers, without the network's name where there is one network: what records call by it.
        "adapter_hash": own_hash,
        **{key.replace(" ", "_").replace("(", "").replace(")", ""): value for key, value in facts.items()},
        "recipe": recipe or None,
        "shares": shares or None,
        "unknown": _unknown(file, facts, shares=shares, is_merge="experts" in recipe),
        "layers": layers,
    }


def _modules(file: LoraFile) -> dict[str, Any]:
    networks = {name.partition(".")[0] for name in file.layers}
    if len(networks) > 1:
        return dict(file.layers)
    return {name.partition(".")[2]: layer for name, layer in file.layers.items()}


def _recorded_shares(location: Location, adapter_hash: str) -> Any:
    """Return the shares in the record beside a merged artifact's file, None if there is none of this very adapter."""
    from safetydpo.artifacts.records import read_record

    record = read_record(location.parent)
    return record.details.get("shares") if record is not None and record.fingerprint == adapter_hash else None


def _unknown(file: LoraFile, facts: dict[str, str | None], *, shares: Any, is_merge: bool) -> list[str]:
    missing = [name for name, value in facts.items() if value is None]
    notes = [f"{', '.join(missing)}: the file does not say"] if missing else []
    if len(file.alphas) < len(file.layers) and file.format != "safetydpo":
        notes.append("alpha: the file does not say; taken as the rank, as diffusers does, so that norms are at scale 1")
    if is_merge and not shares:
        notes.append("shares of experts: the method blends, or the record that holds them is not beside the file")
    elif not is_merge:
        notes.append("shares of experts: it is no merge of ours")
    return notes


def print_description(console: Any, description: dict[str, Any], *, shown: int | None) -> None:
    """Print what `describe` returns."""
    from rich import box
    from rich.table import Table

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for key, value in description.items():
        if key not in ("layers", "shares", "unknown", "recipe"):
            facts.add_row(key.replace("_", " "), "not known" if value is None else str(value))
    for key, value in (description["recipe"] or {}).items():
        if key != "experts":
            facts.add_row(f"recipe: {key.replace('_', ' ')}", "not set" if value is None else str(value))
    console.print(facts)
    experts = (description["recipe"] or {}).get("experts", [])
    if experts:
        shares = description["shares"] or {}
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("expert")
        for heading in ("weight", *(["share of rows"] if shares else []), "hash"):
            table.add_column(heading, justify="left" if heading == "hash" else "right")
        for expert in experts:
            share = [f"{shares.get(expert['name'], 0.0):.3f}"] if shares else []
            table.add_row(expert["name"], f"{expert['weight']:g}", *share, expert["hash"][:16])
        console.print(table)
    _print_layers(console, description["layers"], shown=shown)
    for note in description["unknown"]:
        console.print(f"not known  {note}", soft_wrap=True)


def _print_layers(console: Any, layers: list[dict[str, Any]], *, shown: int | None) -> None:
    from rich import box
    from rich.table import Table

    total = sum(layer["norm"] ** 2 for layer in layers)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("kind", "rank", "scale", "norm of B A", "share"):
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    chosen = layers if shown is None else sorted(layers, key=lambda layer: -layer["norm"])[:shown]
    for layer in chosen:
        share = layer["norm"] ** 2 / total if total else 0.0
        table.add_row(
            layer["layer"],
            layer["kind"],
            str(layer["rank"]),
            f"{layer['scale']:g}",
            f"{layer['norm']:.4g}",
            f"{share:.2%}",
        )
    console.print(table)
    rest = f"; the {len(chosen)} largest are shown, --all shows every one" if len(chosen) < len(layers) else ""
    console.print(f"{len(layers)} layers, norm of all together {total**0.5:.4g}{rest}", soft_wrap=True)
    console.print("norm: Frobenius, every scale included; share: of the sum of squares", soft_wrap=True)


@app.command()
def export(
    file: AdapterFile,
    to: Annotated[str, typer.Option(help="kohya, diffusers, peft, or full: fused into its model.", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder; absent or empty.", show_default=False)],
    family: Annotated[str | None, typer.Option(help="kohya: sd1, sd2 or sdxl, if the layers do not tell.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: demo, local folder or hub id; full: its weights are taken.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="The hub's word for it, such as openrail++.")] = None,
    name: Annotated[str | None, typer.Option(help="Name on the card and of a kohya file; FILE's if left out.")] = None,
) -> None:
    """Write FILE as another program wants it, with a model card (README.md) beside it."""
    from ray_jobs.terminal import TextConsole
    from safetydpo.artifacts.kohya_names import RULES
    from safetydpo.artifacts.lora_files import read_lora_file
    from safetydpo.artifacts.storage import open_location
    from safetydpo.pairs.export import refuse_existing

    for option, value, allowed in (("--to", to, TARGETS), ("--family", family, RULES)):
        if value is not None and value not in allowed:
            raise UsageError(f"expected {option} {', '.join(allowed)}, found {value!r}")
    if name is not None and (not name.strip() or set(name) & set("/\\\0")):
        raise UsageError(f"expected a name without / or \\ for --name, found {name!r}: it becomes a file's")
    source, target = open_location(file), open_location(out)
    target.check_reachable()
    refuse_existing(target)
    title = name or source.name.removesuffix(".safetensors")
    lora = with_base(read_lora_file(source), base=base, licence=licence)
    written = write_full(lora, target) if to == "full" else write_lora(lora, target, to=to, family=family, title=title)
    (target / "README.md").write_bytes(card_of(lora, to=to, file_name=written, title=title).encode())
    console = TextConsole(highlight=False, soft_wrap=True)
    console.print(f"{len(lora.layers)} layers are in {target.shown}: {written}, README.md")


def with_base(file: LoraFile, *, base: str | None, licence: str | None) -> LoraFile:
    """Return the file with the base model and licence that are given, else with what it says or what is known of them.

    Raises:
        UsageError: if the licence is no identifier.
    """
    from safetydpo.diffusion.licences import licence_of
    from safetydpo.pairs.dataset_card import check_licence

    if licence is not None:
        check_licence(licence)
    base_model = base or file.metadata.base_model
    known = licence or file.metadata.licence or licence_of(base_model)
    return replace(file, metadata=replace(file.metadata, base_model=base_model, licence=known))


def write_lora(file: LoraFile, target: Location, *, to: str, family: Any, title: str) -> str:
    """Write the adapter into the folder `target`; return the file's name."""
    from safetydpo.artifacts.layout import ADAPTER_FILE
    from safetydpo.artifacts.lora_export import to_diffusers, to_kohya, to_peft
    from safetydpo.artifacts.lora_files import PEFT_ADAPTER, PEFT_CONFIG

    if to == "kohya":
        data, name = to_kohya(file, rule=family), f"{title}.safetensors"
    elif to == "diffusers":
        data, name = to_diffusers(file), ADAPTER_FILE
    else:
        data, settings = to_peft(file, base_model=file.metadata.base_model)
        name = PEFT_ADAPTER
        (target / PEFT_CONFIG).write_bytes(settings)
    (target / name).write_bytes(data)
    return name


def write_full(file: LoraFile, target: Location) -> str:
    """Write the base model with the adapter in its weights into the local folder `target`.

    Raises:
        UsageError: if no base model is named, or the target is no local folder.
        SafetyDPOError: if the adapter was made for another base model.
    """
    from safetydpo.config.schema import BaseModelConfig
    from safetydpo.diffusion.build import base_fingerprint, resolve_files
    from safetydpo.diffusion.fused import fuse_adapter

    metadata = file.metadata
    if not metadata.base_model:
        raise UsageError(
            "expected the base model's folder or hub id for --to full, found none in the file: name it with --base"
        )
    if not target.is_local:
        raise UsageError(
            f"expected a local folder for a whole model (--out), found {target}: write it here and copy it"
        )
    config = BaseModelConfig(model=metadata.base_model)
    found = base_fingerprint(config)
    if metadata.base_fingerprint and metadata.base_fingerprint != found:
        raise SafetyDPOError(
            f"expected the base model {metadata.base_fingerprint[:12]} of this adapter, found {found[:12]} in "
            f"{metadata.base_model!r}: name the model that it was trained on with --base"
        )
    fuse_adapter(resolve_files(config), file.layers, target.local_path)
    return "model_index.json"


def card_of(file: LoraFile, *, to: Any, file_name: str, title: str) -> str:
    """Return the model card of an exported file."""
    from safetydpo.artifacts.adapters import adapter_hash
    from safetydpo.artifacts.lora_export import is_exact_both_ways
    from safetydpo.artifacts.model_card import ModelCard, render_model_card

    notes = []
    if file.format == "kohya" and not file.metadata.training_hash:
        notes.append("Made from a file under kohya's names, which does not say what it was trained for.")
        if to == "diffusers" and not is_exact_both_ways(file):
            notes.append(
                "Its scales (alpha / rank) are no powers of two and its weights float32: going back to kohya's names "
                "gives each weight to one unit in the last place."
            )
    return render_model_card(
        ModelCard(
            name=title,
            file=file_name,
            published=to,
            metadata=file.metadata,
            adapter_hash=adapter_hash(_modules(file)),
            rank=max(int(layer.down.shape[0]) for layer in file.layers.values()),
            num_layers=len(file.layers),
            notes=notes,
        )
    )
