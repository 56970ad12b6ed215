"""Our training step for measurements: live or cached, its bare passes, and several experts in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.public_trainers import PublicWay, public_step
from safetydpo.artifacts.schemas import caption_sha256
from safetydpo.config.training import DpoConfig, LoraConfig
from safetydpo.diffusion.adapter import initial_adapter, linear_layers
from safetydpo.diffusion.backbone import Backbone
from safetydpo.diffusion.build import DTYPES
from safetydpo.diffusion.targets import matches_suffix
from safetydpo.dpo.batch import PreferenceData, PreferenceRow, StepBatch, step_batch
from safetydpo.dpo.descent import code_of_a_step
from safetydpo.dpo.draws import RowUse
from safetydpo.dpo.engine import lora_signature, open_engine
from safetydpo.dpo.loss import squared_error
from safetydpo.dpo.reference import ErrorContext, compute_errors
from safetydpo.dpo.step import errors_to_store, policy_loss

NUM_PAIRS = 16
DRAWS = 16
"""Stored draws of each pair: more than a measurement comes to."""
ENCODED_TOGETHER = 4
LORA = LoraConfig(rank=4)
DPO = DpoConfig(
    pairs_per_step=4,
    strategy="single",
    safe_rise_weight=0.0,
    retention_weight=0.0,
    captions="unsafe",
    beta=5000.0,
    learning_rate=1e-5,
)


def repeat(step: Callable[[], None], times: int) -> Callable[[], None]:
    """Return `step` done several times."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def public_way(
    folder: Path, kind: PublicWay, pairs: tuple[Tensor, Tensor, list[str]], *, dtype: str
) -> Callable[[], None]:
    """Return a public trainer's step with the settings of ours."""
    return public_step(
        folder,
        kind,
        pairs,
        rank=LORA.rank,
        targets=LORA.targets,
        pairs_per_step=DPO.pairs_per_step,
        beta=DPO.beta,
        learning_rate=DPO.learning_rate,
        max_grad_norm=DPO.max_grad_norm,
        dtype=DTYPES[dtype],
    )


def make_pairs(size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return random uint8 pictures (safe, unsafe) and one caption per pair; speed does not depend on the content."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PAIRS, size, size, 3)
    safe, unsafe = (torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(2))
    return safe, unsafe, [f"a drawing of a bomb on blue, number {index}" for index in range(NUM_PAIRS)]


def encode_once(backbone: Backbone, pairs: tuple[Tensor, Tensor, list[str]]) -> PreferenceData:
    """Return the preferences with latents per picture and text features per caption."""
    safe, unsafe, captions = pairs
    # In parts: an autoencoder of true size holds gigabytes for every picture.
    parts = [backbone.encode_images(part) for side in (safe, unsafe) for part in side.split(ENCODED_TOGETHER)]
    latents = torch.cat(parts).half().cpu().numpy()
    texts = ["", *captions]
    condition = backbone.encode_prompts(texts)
    shas = [caption_sha256(text) for text in texts]
    features = dict(zip(shas, condition.tokens.float().cpu().numpy(), strict=True))
    pooled = condition.pooled
    rows = [
        PreferenceRow(f"pair{row:03d}", f"safe{row}", f"unsafe{row}", caption_sha256(text), caption_sha256(text))
        for row, text in enumerate(captions)
    ]
    ids = [f"{side}{row}" for side in ("safe", "unsafe") for row in range(NUM_PAIRS)]
    return PreferenceData.from_tables(
        rows,
        latents=dict(zip(ids, latents, strict=True)),
        embeddings=features,
        pooled=None if pooled is None else dict(zip(shas, pooled.float().cpu().numpy(), strict=True)),
        latent_shape=backbone.latent_shape(height=safe.shape[1], width=safe.shape[2]),
    )


class OurTraining:
    """Training steps of one expert, as `train_expert` takes them, without checkpoints."""

    def __init__(
        self,
        backbone: Backbone,
        data: PreferenceData,
        *,
        cached: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
        fused: bool = False,
        pairs_per_step: int = DPO.pairs_per_step,
        adapter_compute: str = "float32",
        activation_checkpointing: bool = False,
    ) -> None:
        changes = {
            "pairs_per_step": pairs_per_step,
            "adapter_compute": adapter_compute,
            "compiled": compiled,
            "activation_checkpointing": activation_checkpointing,
        }
        self.config = DPO.model_copy(update=changes | ({"reference": "cached"} if cached else {}))
        self.backbone, self.data = backbone, with_stored_errors(backbone, data, self.config) if cached else data
        self._engine = open_engine(backbone, config=self.config, lora=LORA)
        signature = lora_signature(LORA)
        backbone.load_adapter(
            initial_adapter(
                backbone.named_linear_layers(signature.targets),
                signature,
                base_fingerprint=backbone.fingerprint,
                run_seed=0,
                init="shared",
                expert_name="x",
            )
        )
        if channels_last:
            backbone.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fused: torch.optim.AdamW | None = None
        if fused:
            tensors = [tensor for _, tensor in backbone.adapter_parameters()]
            self._fused = torch.optim.AdamW(tensors, lr=self.config.learning_rate, fused=True)
        self._done = 0

    def batch(self) -> StepBatch:
        """Return the next step's batch."""
        self._done += 1
        return step_batch(
            self.data,
            self._done - 1,
            config=self.config,
            run_seed=0,
            expert="x",
            num_timesteps=self.backbone.num_train_timesteps,
        )

    def step(self) -> None:
        """Take one optimizer step."""
        with code_of_a_step(self.backbone, self.config):
            loss, _ = policy_loss(self.backbone, self.batch(), config=self.config)
            self._engine.backward(loss)
        if self._fused is None:
            self._engine.step(learning_rate=self.config.learning_rate)
            return
        torch.nn.utils.clip_grad_norm_(self._fused.param_groups[0]["params"], self.config.max_grad_norm)
        self._fused.step()
        self._fused.zero_grad()


def with_stored_errors(backbone: Backbone, data: PreferenceData, config: DpoConfig) -> PreferenceData:
    """Return the data with the errors of every draw that a measurement can come to."""
    context = ErrorContext(
        backbone.fingerprint,
        "float32",
        config.pairs_per_step,
        backbone.num_train_timesteps,
        0,
        config,
        LORA if config.compiled else None,
    )
    uses = [RowUse(pair, draw) for pair in range(NUM_PAIRS) for draw in range(DRAWS)]
    errors = compute_errors(backbone, data, uses, context)
    return replace(data, reference_errors=errors.view(NUM_PAIRS, DRAWS, 2))


def bare_passes(training: OurTraining, *, with_reference: bool) -> Callable[[], None]:
    """Return the network's passes of a step and nothing else, always on the same batch."""
    backbone, batch = training.backbone, training.batch()
    noisy = torch.cat([batch.latents_safe, batch.latents_unsafe])
    timesteps = torch.cat([batch.timesteps, batch.timesteps])
    condition = batch.condition.followed_by(batch.condition)
    parameters = [tensor for _, tensor in backbone.adapter_parameters()]

    def passes() -> None:
        if with_reference:
            with torch.no_grad(), backbone.adapter_off():
                backbone.predict(noisy, timesteps, condition)
        loss = backbone.predict(noisy, timesteps, condition).square().mean()
        torch.autograd.grad(loss, parameters)

    return passes


def reference_pass(training: OurTraining) -> Callable[[], None]:
    """Return the pass that computes the reference's errors of one step."""
    batch = training.batch()
    return lambda: void(errors_to_store(training.backbone, batch))


def void(_: object) -> None:
    """Forget a result."""


class StackedLora(nn.Module):
    """A linear layer with the adapters of several experts: equal parts of the batch go through one each."""

    def __init__(self, base: nn.Linear, *, experts: int, rank: int) -> None:
        super().__init__()
        self.base, self.experts, self.is_on = base, experts, True
        self.down = nn.Parameter(torch.randn(experts, base.in_features, rank) / rank)
        self.up = nn.Parameter(torch.zeros(experts, rank, base.out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs)
        if not self.is_on:
            return outputs
        # In float32, as the product's adapters are by default.
        parts = inputs.to(self.down.dtype).reshape(self.experts, -1, inputs.shape[-1])
        return outputs + (parts @ self.down @ self.up).reshape(outputs.shape).to(outputs.dtype)


def clip_each_expert(layers: Sequence[StackedLora], *, max_norm: float) -> None:
    """Scale the gradients of each expert to a joint 2-norm of at most `max_norm`."""
    gradients = [tensor.grad for layer in layers for tensor in (layer.down, layer.up) if tensor.grad is not None]
    squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0)
    scale = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale[:, None, None])


def stacked_experts(
    backbone: Backbone,
    data: PreferenceData,
    *,
    experts: int,
    channels_last: bool = False,
    compiled: bool = False,
    fused: bool = False,
) -> Callable[[], None]:
    """Return a step that trains several experts at once, `pairs_per_step` pairs of each in one batch."""
    layers = []
    for name, linear in linear_layers(backbone.network).items():
        if matches_suffix(name, LORA.targets):
            parent, _, child = name.rpartition(".")
            layers.append(StackedLora(linear, experts=experts, rank=LORA.rank))
            setattr(backbone.network.get_submodule(parent), child, layers[-1])
    if channels_last:
        backbone.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainable = [tensor for layer in layers for tensor in (layer.down, layer.up)]
    optimizer = torch.optim.AdamW(trainable, lr=DPO.learning_rate, fused=fused or None)
    config = DPO.model_copy(update={"pairs_per_step": DPO.pairs_per_step * experts})
    done = 0

    def switch(is_on: bool) -> None:
        for layer in layers:
            layer.is_on = is_on

    def step() -> None:
        nonlocal done
        batch = step_batch(data, done, config=config, run_seed=0, expert="x", num_timesteps=1000)
        done += 1
        # Safe and unsafe pictures of one expert stand together, so that its part of the batch is one block.
        order = torch.arange(2 * batch.num_pairs).view(2, experts, -1).transpose(0, 1).reshape(-1)
        latents, noise = (
            torch.cat(two)[order] for two in ((batch.latents_safe, batch.latents_unsafe), (batch.noise, batch.noise))
        )
        timesteps = torch.cat([batch.timesteps, batch.timesteps])[order]
        condition = batch.condition.followed_by(batch.condition).select(order)
        noisy = backbone.add_noise(latents, noise, timesteps)
        with backbone.compiled() if compiled else nullcontext():
            switch(False)
            with torch.no_grad():
                reference = squared_error(backbone.predict(noisy, timesteps, condition), noise)
            switch(True)
            policy = squared_error(backbone.predict(noisy, timesteps, condition), noise)
            rise = (policy - reference).view(experts, 2, -1)
            loss = -F.logsigmoid(-(config.beta / 2) * (rise[:, 0] - rise[:, 1])).mean(dim=1).sum()
            torch.autograd.backward(loss)
        clip_each_expert(layers, max_norm=config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step
