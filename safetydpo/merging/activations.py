"""Layer inputs of the base model: what Co-Merge's experts are scored on.

For every prompt the base draws a picture's latents (its own sampler, guided), noise is added at each timestep,
and the network predicts once with the prompt as condition; the inputs of the target layers during that call are
kept. So the inputs lie where training and sampling visit (pure noise at a small timestep would not). Adapters
are off: the inputs are the same for all experts, collected once, and independent of the set of experts.

Axis legend: `input` prompts x timesteps (timestep moves fastest), `token` tokens or pixels of a layer,
`d_in` input features of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safetydpo.artifacts.storage import Location
from safetydpo.config.schema import SamplerConfig
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.render import initial_noise
from safetydpo.errors import SafetyDPOError, UsageError
from safetydpo.merging.collected import collected_from_bytes, collected_to_bytes, open_collected, write_collected
from safetydpo.seeding import derive_seed

METADATA_KEY = "safetydpo_layer_inputs"
WHAT = "layer inputs"


def collect_inputs(
    backbone: Backbone,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    timesteps: Sequence[int],
    targets: Sequence[str],
    sampler: SamplerConfig,
    max_tokens: int | None = 16,
    observe: Callable[[str, int, Tensor], None] | None = None,
    chosen: Collection[int] | None = None,
) -> dict[str, Float[Tensor, "input token d_in"]]:
    """Return the float16 inputs of every target layer for each (prompt, timestep), prompt by prompt.

    Initial latents come from `seeds[row]`, the noise at timestep t from (seed, "merging.activations", t). Batches
    hold `sampler.batch_size` rows, the last one padded, so a row's inputs do not depend on its neighbours.
    Deterministic on a CPU with a fixed number of threads.

    Args:
        backbone: the base model; an installed adapter is switched off meanwhile.
        prompts: unsafe prompts, balanced over categories.
        seeds: one seed per prompt.
        timesteps: training timesteps in [0, num_train_timesteps).
        targets: name suffixes of linear layers, as in `lora.targets`.
        sampler: how the base draws the clean latents.
        max_tokens: most tokens kept per input, taken at a fixed stride; None = all.
        observe: called with (module, row, all tokens [token, d_in]) for every prompt and timestep.
        chosen: rows whose inputs are wanted; None = all. Batches hold the same rows whatever is chosen, and those
            without a chosen row are skipped: parts that are made apart have the very bytes of the whole.

    Raises:
        UsageError: if there is no prompt, not one seed for each, a timestep out of range, or no such row.
        SafetyDPOError: if an input is not finite in float16.
    """
    _check_request(backbone, prompts=prompts, seeds=seeds, timesteps=timesteps, max_tokens=max_tokens)
    wanted = _check_chosen(chosen, num_prompts=len(prompts))
    modules = sorted(name for name, _ in backbone.named_linear_layers(targets))
    shape = backbone.latent_shape(height=sampler.height, width=sampler.width)
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    with torch.no_grad(), backbone.adapter_off():
        empty = backbone.encode_prompts([""] * sampler.batch_size)
        for rows, places in _batches(len(prompts), size=sampler.batch_size, wanted=wanted):
            padded = rows + [rows[-1]] * (sampler.batch_size - len(rows))
            condition = backbone.encode_prompts([prompts[row] for row in padded])
            noise = initial_noise([seeds[row] for row in padded], shape=shape)
            clean = backbone.sample(
                noise, condition, empty=empty, steps=sampler.steps, guidance_scale=sampler.guidance_scale
            )
            per_step: dict[str, list[Tensor]] = {name: [] for name in modules}
            for timestep in timesteps:
                noisy, steps = _noised(backbone, clean, seeds=[seeds[row] for row in padded], timestep=timestep)
                with backbone.layer_inputs(modules) as captured:
                    backbone.predict(noisy, steps, condition)
                for name in modules:
                    tokens = _tokens(captured[name][0][: len(rows)])
                    per_step[name].append(_thin(tokens, max_tokens)[places])
                    _show(observe, name, {rows[place]: tokens[place] for place in places})
            for name in modules:
                kept[name].append(torch.stack(per_step[name], dim=1).flatten(0, 1))
    return {name: _finite(name, torch.cat(parts)) for name, parts in kept.items()}


def join_inputs(
    parts: Mapping[str, Float[Tensor, "part token d_in"]], groups: Sequence[str], *, module: str
) -> Float[Tensor, "input token d_in"]:
    """Return one module's inputs of all prompts in their order, from those that were collected group by group.

    Args:
        parts: group -> inputs of the group's prompts, in the order of the prompts.
        groups: the group of each prompt.
        module: the module's name, for messages.

    Raises:
        SafetyDPOError: if a group is missing, or parts do not have as many inputs per prompt.
    """
    missing = next((group for group in groups if group not in parts), None)
    if missing is not None or not groups:
        raise SafetyDPOError(f"expected layer inputs of every group of prompts, found none of {missing!r}")
    rows = {group: [row for row, name in enumerate(groups) if name == group] for group in parts}
    first = parts[groups[0]]
    per_prompt = len(first) // len(rows[groups[0]])
    values = first.new_empty(len(groups), per_prompt, *first.shape[1:])
    for group, part in parts.items():
        if len(part) != per_prompt * len(rows[group]):
            raise SafetyDPOError(
                f"expected {per_prompt} inputs of {module!r} for each of {len(rows[group])} prompts of group "
                f"{group!r}, found {len(part)} in all: collect them again"
            )
        values[rows[group]] = part.unflatten(0, (-1, per_prompt))
    return values.flatten(0, 1)


def join_input_files(
    location: Location, parts: Mapping[str, Location], groups: Sequence[str], *, base_fingerprint: str
) -> tuple[str, int]:
    """Write the inputs of several groups' files as one, a module at a time; return (its SHA-256, number of modules).

    Args:
        location: the file.
        parts: group -> the file of its inputs.
        groups: the group of each prompt.
        base_fingerprint: of the base model.

    Raises:
        SafetyDPOError: if a part is truncated, is none of ours, was collected on another base model, or has other
            modules than the others; and as `join_inputs`.
    """
    opened = {
        group: open_collected(part, kind=METADATA_KEY, what=WHAT, base_fingerprint=base_fingerprint)
        for group, part in parts.items()
    }
    modules = sorted(set().union(*opened.values()))
    for group, part in opened.items():
        if list(part) != modules:
            raise SafetyDPOError(
                f"expected inputs of {len(modules)} layers of group {group!r}, found {len(part)}: collect them again"
            )
    counts = {group: groups.count(group) for group in opened}
    shapes = {}
    for module in modules:
        some = next(iter(opened))
        length, *rest = opened[some].shape(module)
        shapes[module] = (length // max(1, counts[some]) * len(groups), *rest)
    sha256 = write_collected(
        location,
        shapes,
        lambda module: join_inputs({group: part[module] for group, part in opened.items()}, groups, module=module),
        number="F16",
        kind=METADATA_KEY,
        base_fingerprint=base_fingerprint,
    )
    return sha256, len(modules)


def inputs_to_bytes(inputs: Mapping[str, Float[Tensor, "input token d_in"]], *, base_fingerprint: str) -> bytes:
    """Return layer inputs as a safetensors file (float16); equal inputs give equal bytes."""
    halves = {name: values.to(torch.float16) for name, values in inputs.items()}
    return collected_to_bytes(halves, kind=METADATA_KEY, base_fingerprint=base_fingerprint)


def inputs_from_bytes(
    data: bytes, *, source: str, base_fingerprint: str
) -> dict[str, Float[Tensor, "input token d_in"]]:
    """Return the layer inputs of a file written by `inputs_to_bytes`.

    Raises:
        SafetyDPOError: if the file is truncated, is none of ours, or was collected on another base model.
    """
    return collected_from_bytes(data, kind=METADATA_KEY, what=WHAT, source=source, base_fingerprint=base_fingerprint)


def _check_request(
    backbone: Backbone,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    timesteps: Sequence[int],
    max_tokens: int | None,
) -> None:
    if not prompts or len(prompts) != len(seeds):
        raise UsageError(
            f"expected at least one prompt and one seed for each, found {len(prompts)} prompts and {len(seeds)} seeds"
        )
    limit = backbone.num_train_timesteps
    wrong = [timestep for timestep in timesteps if not 0 <= timestep < limit]
    if wrong or not timesteps:
        raise UsageError(
            f"expected merge.activation_timesteps in 0 … {limit - 1}, found {wrong or 'none'}: correct the config"
        )
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"expected at least one token per input, found max_tokens = {max_tokens}")


def _batches(num_prompts: int, *, size: int, wanted: Collection[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the rows of each batch and the places of those that are wanted, without batches that hold none."""
    for start in range(0, num_prompts, size):
        rows = list(range(start, min(start + size, num_prompts)))
        places = [place for place, row in enumerate(rows) if row in wanted]
        if places:
            yield rows, places


def _noised(backbone: Backbone, clean: Tensor, *, seeds: Sequence[int], timestep: int) -> tuple[Tensor, Tensor]:
    """Return clean latents with each row's own noise at one timestep, and the timesteps."""
    drawn = [derive_seed(seed, "merging.activations", str(timestep)) for seed in seeds]
    steps = torch.full((len(seeds),), timestep, dtype=torch.long, device=clean.device)
    channels, height, width = clean.shape[1:]
    noise = initial_noise(drawn, shape=(channels, height, width))
    return backbone.add_noise(clean, noise.to(clean), steps), steps


def _check_chosen(chosen: Collection[int] | None, *, num_prompts: int) -> frozenset[int]:
    wanted = frozenset(range(num_prompts) if chosen is None else chosen)
    if not wanted or not wanted <= set(range(num_prompts)):
        raise UsageError(f"expected chosen rows in 0 … {num_prompts - 1}, found {sorted(wanted) or 'none'}")
    return wanted


def _show(observe: Callable[[str, int, Tensor], None] | None, module: str, tokens: Mapping[int, Tensor]) -> None:
    if observe is not None:
        for row, values in tokens.items():
            observe(module, row, values)


def _tokens(values: Tensor) -> Tensor:
    """Return a layer's input as [row, token, d_in]; a layer without token axis counts as one token."""
    return values.flatten(1, -2) if values.ndim > 2 else values.unsqueeze(1)


def _thin(tokens: Tensor, max_tokens: int | None) -> Tensor:
    """Keep at most `max_tokens` tokens at a fixed stride."""
    if max_tokens is not None:
        tokens = tokens[:, :: -(-tokens.shape[1] // max_tokens)]
    return tokens.to("cpu", torch.float16)


def _finite(name: str, values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise SafetyDPOError(
            f"expected inputs of {name!r} within the range of float16, found NaN or infinity: check the base model"
        )
    return values
