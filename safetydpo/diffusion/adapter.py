"""One LoRA slot in a frozen network: peft layers put in once, then overwritten in place.

Axis legend: `rank` LoRA rank, `d_in d_out` axes of a linear layer.

A reference prediction is the same network with the slot switched off, so no second copy of the network exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from safetydpo.artifacts.adapters import LoraLayer, LoraSignature
from safetydpo.diffusion.lora_layer import SLOT, Compute, SlotLinear
from safetydpo.diffusion.targets import matches_suffix, require_targets
from safetydpo.errors import SafetyDPOError
from safetydpo.seeding import derive_torch


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer of a network without adapter by its dotted name, in the network's order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def initial_adapter(
    named_linear_layers: Iterable[tuple[str, tuple[int, int]]],
    signature: LoraSignature,
    *,
    base_fingerprint: str,
    run_seed: int,
    init: Literal["shared", "independent"],
    expert_name: str,
) -> dict[str, LoraLayer]:
    """Draw the adapter that training starts from: A ~ N(0, 1 / rank^2) per module, B = 0.

    Each module's draw is keyed by (base fingerprint, signature, module name) and, if `init` is `independent`,
    also by the expert's name. With `shared`, rows of A therefore mean the same in all experts of a run.

    Args:
        named_linear_layers: pairs (module name, (d_in, d_out)), as `Backbone.named_linear_layers` gives them.
    """
    layers = {}
    for name, (d_in, d_out) in named_linear_layers:
        parts = [
            base_fingerprint,
            str(signature.rank),
            repr(float(signature.alpha)),
            *sorted(signature.targets),
            name,
        ]
        if init == "independent":
            parts.append(expert_name)
        generator = derive_torch(run_seed, f"lora_init_{init}", "\x1f".join(parts))
        down = torch.randn(signature.rank, d_in, generator=generator) / signature.rank
        layers[name] = LoraLayer(down=down, up=torch.zeros(d_out, signature.rank))
    return layers


class AdapterSlot:
    """At most one LoRA adapter inside a network; its tensors are always float32.

    Layers are given and returned with every scale folded into `up`. While `signature.alpha != signature.rank`
    the trained B differs from `up` by the factor alpha / rank, as it does in peft.
    """

    def __init__(self, network: nn.Module, *, device: torch.device | None = None) -> None:
        """Look up the linear layers of a network that carries no adapter yet.

        Adapters stand on `device`, wherever the network's weights wait; None = beside them.
        """
        self._network, self._device = network, device
        self._linear = linear_layers(network)
        self._signature: LoraSignature | None = None
        self._base_scaling: dict[str, float] = {}
        self._compute: Compute = "float32"
        self._gate: float | None = None

    def shapes(self, suffixes: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (name, (d_in, d_out)) of the linear layers whose name ends in one of the suffixes.

        Raises:
            UsageError: if a suffix names no linear layer.
        """
        require_targets(self._linear, suffixes)
        for name, layer in self._linear.items():
            if matches_suffix(name, suffixes):
                yield name, (layer.in_features, layer.out_features)

    def weight(self, name: str) -> Tensor:
        """Return the live base weight of a linear layer, for closed-form edits in place.

        Raises:
            SafetyDPOError: if the network has no linear layer of that name.
        """
        if name not in self._linear:
            raise SafetyDPOError(
                f"expected the name of a linear layer of the denoiser, found {name!r}: "
                "list the names with named_linear_layers"
            )
        return self._linear[name].weight

    def install(self, signature: LoraSignature) -> None:
        """Put the peft layers of `signature` in, with A = B = 0: the network still computes what the base does.

        A slot that is in place is taken out first.

        Raises:
            UsageError: if a target names no linear layer.
        """
        names = [name for name, _ in self.shapes(signature.targets)]
        self._inject(signature, names)

    def compute_in(self, compute: Compute) -> None:
        """Say in which type adapters are computed from now on (`SlotLinear.compute`)."""
        self._compute = compute
        for module in self._lora_modules().values():
            module.compute = compute

    def load(self, layers: Mapping[str, LoraLayer], *, scale: float = 1.0) -> None:
        """Overwrite the slot with `layers`; the network then computes base + scale * up @ down.

        Tensors are copied in place while ranks stay the same; layers of another rank get new tensors.
        Target layers that are missing from `layers` are left unchanged by the adapter (zeros).

        Raises:
            SafetyDPOError: no slot installed, a module that is no target of the slot, or shapes that do not fit;
                the network is then as it was.
        """
        installed = self._installed()
        self._check_layers(layers, installed)
        for name, layer in layers.items():
            self._set_rank(name, installed[name], layer.down.shape[0])
        with torch.no_grad():
            for name, module in installed.items():
                down, up = module.lora_A[SLOT].weight, module.lora_B[SLOT].weight
                if name in layers:
                    down.copy_(layers[name].down)
                    up.copy_(layers[name].up / self._base_scaling[name])
                else:
                    down.zero_()
                    up.zero_()
                module.scaling[SLOT] = self._base_scaling[name] * scale

    def swap(self, signature: LoraSignature, layers: Mapping[str, LoraLayer]) -> None:
        """Compute base + up @ down from now on, putting the slot in only if it does not stand there already.

        The same as `install` and `load`, but many adapters one after another cost no new peft layers.

        Raises:
            UsageError: if a target names no linear layer.
            SafetyDPOError: as `load`.
        """
        if self._signature != signature:
            self.install(signature)
        self.load(layers)

    def export(self) -> dict[str, LoraLayer]:
        """Return copies of the slot's layers on the CPU, float32, with every scale folded into `up`."""
        return {
            name: LoraLayer(
                down=module.lora_A[SLOT].weight.detach().to("cpu", torch.float32, copy=True),
                up=(module.lora_B[SLOT].weight.detach() * module.scaling[SLOT]).to("cpu", torch.float32),
            )
            for name, module in self._installed().items()
        }

    def parameters(self) -> list[tuple[str, Tensor]]:
        """Return the trainable tensors as (`<module>.lora_A.weight` or `.lora_B.weight`, tensor), in a fixed order."""
        return [
            (f"{name}.{key}.weight", getattr(module, key)[SLOT].weight)
            for name, module in self._installed().items()
            for key in ("lora_A", "lora_B")
        ]

    @property
    def is_gated(self) -> bool:
        """Whether the adapter is switched by a number (`SlotLinear.gate`) instead of by peft."""
        return self._gate is not None

    @contextmanager
    def gated(self) -> Iterator[None]:
        """Switch the adapter by a number inside this context, so that on and off are one and the same code."""
        is_off = any(module.disable_adapters for module in self._lora_modules().values())
        with self._gate_at(0.0 if is_off else 1.0):
            yield

    @contextmanager
    def _gate_at(self, value: float) -> Iterator[None]:
        before = self._gate
        self._set_gates(value)
        try:
            yield
        finally:
            self._set_gates(before)

    def _set_gates(self, value: float | None) -> None:
        self._gate = value
        # A new tensor each time: a pass that waits for its way back goes on holding the number it was made with.
        gates: dict[torch.device, Tensor] = {}
        for module in self._lora_modules().values():
            if value is None:
                module.gate = None
                continue
            device = module.lora_A[SLOT].weight.device
            if device not in gates:
                gates[device] = torch.full((), value, device=device)
            module.gate = gates[device]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the base alone inside this context; it may be nested, and does nothing without a slot."""
        if self.is_gated:
            with self._gate_at(0.0):
                yield
            return
        modules = [module for module in self._lora_modules().values() if not module.disable_adapters]
        # peft switches requires_grad together with the adapter and would switch it on at the end, even for an
        # adapter that its owner had frozen.
        trainable = [[p.requires_grad for p in module.parameters()] for module in modules]
        for module in modules:
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module, flags in zip(modules, trainable, strict=True):
                module.enable_adapters(True)
                for parameter, flag in zip(module.parameters(), flags, strict=True):
                    parameter.requires_grad_(flag)

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Add the adapter to the base's weights inside this context, so that a pass costs what the base's does.

        Afterwards the weights are the base's again, bit for bit. It does nothing without a slot, or while it is off.

        Raises:
            SafetyDPOError: if a weight is not float32: most of an adapter is lost when added to a shorter number.
        """
        modules = [] if self._gate == 0 else [m for m in self._lora_modules().values() if not m.disable_adapters]
        weights = [module.get_base_layer().weight for module in modules]
        for weight in weights:
            if weight.dtype != torch.float32:
                raise SafetyDPOError(
                    f"expected a base in float32 to add an adapter to its weights, found {weight.dtype}: leave "
                    "identity.sampler.fused out, or use identity.base.dtype float32"
                )
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for module, weight in zip(modules, weights, strict=True):
                    delta = module.lora_B[SLOT].weight @ module.lora_A[SLOT].weight
                    weight.add_(delta.to(weight.device), alpha=module.scaling[SLOT])
            with self.off():
                yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)

    def remove(self) -> None:
        """Take the slot out; the network holds its own layers again, untouched."""
        for name, module in self._lora_modules().items():
            parent, _, child = name.rpartition(".")
            setattr(self._network.get_submodule(parent), child, module.get_base_layer())
        if hasattr(self._network, "peft_config"):
            del self._network.peft_config
        self._signature = None
        self._base_scaling = {}

    def _lora_modules(self) -> dict[str, SlotLinear]:
        found = ((name, self._network.get_submodule(name)) for name in self._linear)
        return {name: module for name, module in found if isinstance(module, SlotLinear)}

    def _installed(self) -> dict[str, SlotLinear]:
        self._current_signature()
        return self._lora_modules()

    def _current_signature(self) -> LoraSignature:
        if self._signature is None:
            raise SafetyDPOError("expected an installed adapter, found none: call install_adapter(signature) first")
        return self._signature

    def _set_rank(self, name: str, module: SlotLinear, rank: int) -> None:
        """Give a layer tensors of another rank: new peft layers would cost many times what a merge does."""
        if int(module.r[SLOT]) == rank:
            return
        signature = self._current_signature()
        down, up = module.lora_A[SLOT], module.lora_B[SLOT]
        for part, shape in ((down, (rank, down.in_features)), (up, (up.out_features, rank))):
            tensor = torch.zeros(shape, device=part.weight.device)
            part.weight = nn.Parameter(tensor, requires_grad=part.weight.requires_grad)
        down.out_features = up.in_features = rank
        module.r[SLOT] = module.lora_alpha[SLOT] = rank
        # A layer of another rank was not trained in this slot: all its scales are already in `up`.
        self._base_scaling[name] = signature.alpha / signature.rank if rank == signature.rank else 1.0

    def _inject(self, signature: LoraSignature, names: Sequence[str]) -> None:
        self.remove()
        config = LoraConfig(
            r=signature.rank,
            lora_alpha=signature.rank,
            target_modules=list(names),
            lora_dropout=0.0,
            init_lora_weights=False,
        )
        # peft's hook for layers of another make; it is not in its stable interface (constraints.txt pins it).
        config._register_custom_module({nn.Linear: SlotLinear})
        # peft's layers draw initial values even when told not to; nobody else's random state may move with it.
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, self._network, adapter_name=SLOT)
        self._signature = signature
        for name, module in self._lora_modules().items():
            device = self._device or module.get_base_layer().weight.device
            for part in (module.lora_A[SLOT], module.lora_B[SLOT]):
                part.to(device=device, dtype=torch.float32)
                nn.init.zeros_(part.weight).requires_grad_(True)
            self._base_scaling[name] = signature.alpha / signature.rank
            module.scaling[SLOT] = self._base_scaling[name]
            module.compute = self._compute
        self._set_gates(self._gate)

    def _check_layers(self, layers: Mapping[str, LoraLayer], installed: Mapping[str, SlotLinear]) -> None:
        for name in sorted(layers):
            if name not in installed:
                raise SafetyDPOError(
                    f"expected an adapter for the targets {', '.join(self._current_signature().targets)} of this "
                    f"base model, found a layer for {name!r}: first differing key '{name}.lora_A.weight'. "
                    "Use an adapter of the same base model and lora.targets"
                )
            base = self._linear[name]
            rank = layers[name].down.shape[0]
            shapes = {"lora_A": layers[name].down.shape, "lora_B": layers[name].up.shape}
            wanted = {"lora_A": (rank, base.in_features), "lora_B": (base.out_features, rank)}
            for key, shape in shapes.items():
                if tuple(shape) != wanted[key]:
                    raise SafetyDPOError(
                        f"expected '{name}.{key}.weight' of shape {list(wanted[key])}, found {list(shape)}: "
                        "use an adapter that was trained on this base model"
                    )
