"""A frozen denoiser with one adapter slot: the part of the `Backbone` protocol that is the same for every network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safetydpo.artifacts.adapters import Denoiser, LoraLayer, LoraSignature
from safetydpo.diffusion.adapter import AdapterSlot
from safetydpo.diffusion.lora_layer import Compute
from safetydpo.errors import SafetyDPOError

COMPILED_BLOCKS = frozenset(
    {
        "BasicTransformerBlock",
        "ResnetBlock2D",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    }
)
"""Classes of the blocks that hold nearly all of a denoiser's work."""
COMPILED_VARIANTS = 64
"""Shapes of one class of blocks that are compiled at most; what comes after them runs as it is."""


class AdaptedNetwork:
    """The denoiser, its adapter slot, and the inputs of its layers."""

    denoiser: ClassVar[Denoiser]

    def __init__(self, network: Any, *, device: torch.device | None = None) -> None:
        """Take a denoiser that carries no adapter yet; adapters stand on `device`, None = beside its weights."""
        self._denoiser = network
        self._compiled: dict[nn.Module, Any] = {}
        self._slot = AdapterSlot(network, device=device)

    @property
    def network(self) -> nn.Module:
        """Return the denoiser."""
        network: nn.Module = self._denoiser
        return network

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Run the blocks of the denoiser through `torch.compile` inside this context."""
        blocks = [module for module in self._denoiser.modules() if type(module).__name__ in COMPILED_BLOCKS]
        for block in blocks:
            # Each block on its own: equal ones share their code, so it takes seconds where the whole takes minutes.
            if block not in self._compiled:
                self._compiled[block] = torch.compile(block.forward, dynamic=False)
            block.forward = self._compiled[block]
        try:
            with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):  # type: ignore[no-untyped-call]
                yield
        finally:
            for block in blocks:
                del block.forward

    @contextmanager
    def compiled_for_training(self) -> Iterator[None]:
        """Run the blocks compiled inside this context, policy and reference by the same code (`as_reference`)."""
        with self._slot.gated(), self.compiled():
            yield

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute with the base alone inside this context; what it predicts is to be detached."""
        # Code that is compiled for a way back differs in its last bits from code compiled without one.
        with torch.set_grad_enabled(self._slot.is_gated), self._slot.off():
            yield

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep few activations in passes with a gradient and compute the others again, or keep all of them."""
        # diffusers does so in each block, and only where a gradient is wanted: a reference pass without one stays as it
        # is.
        if enabled:
            self._denoiser.enable_gradient_checkpointing()
        else:
            self._denoiser.disable_gradient_checkpointing()

    def compute_adapter_in(self, compute: Compute) -> None:
        """Say in which type the adapter is computed from now on; see `SlotLinear.compute`."""
        self._slot.compute_in(compute)

    def install_adapter(self, signature: LoraSignature) -> None:
        """Put the adapter slot in, with all tensors zero."""
        self._slot.install(signature)

    def load_adapter(self, layers: Mapping[str, LoraLayer], *, scale: float = 1.0) -> None:
        """Overwrite the slot; see `AdapterSlot.load`."""
        self._slot.load(layers, scale=scale)

    def swap_adapter(self, signature: LoraSignature, layers: Mapping[str, LoraLayer]) -> None:
        """Draw with `layers` from now on; see `AdapterSlot.swap`."""
        self._slot.swap(signature, layers)

    def export_adapter(self) -> dict[str, LoraLayer]:
        """Return copies of the slot's layers with every scale folded into `up`."""
        return self._slot.export()

    def adapter_parameters(self) -> list[tuple[str, Tensor]]:
        """Return the slot's trainable tensors with names, in a fixed order."""
        return self._slot.parameters()

    def adapter_off(self) -> AbstractContextManager[None]:
        """Compute with the base alone inside this context."""
        return self._slot.off()

    def adapter_fused(self) -> AbstractContextManager[None]:
        """Compute with the adapter in the base's weights inside this context; see `AdapterSlot.fused`."""
        return self._slot.fused()

    def remove_adapter(self) -> None:
        """Take the slot out."""
        self._slot.remove()

    def layer_weight(self, module: str) -> Tensor:
        """Return the live base weight of a linear layer."""
        return self._slot.weight(module)

    def named_linear_layers(self, suffixes: Sequence[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (module name, (d_in, d_out)) of the denoiser's linear layers whose name ends in a suffix."""
        return self._slot.shapes(suffixes)

    @contextmanager
    def layer_inputs(self, modules: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
        """Record the first input of the named modules at every call inside this context (detached, on device).

        Raises:
            SafetyDPOError: if the denoiser has no module of that name.
        """
        known = dict(self._denoiser.named_modules())
        for name in modules:
            if name not in known:
                raise SafetyDPOError(
                    f"expected the name of a module of the {self.denoiser}, found {name!r}: "
                    "list the names with named_linear_layers"
                )
        captured: dict[str, list[Tensor]] = {name: [] for name in modules}
        handles = [known[name].register_forward_pre_hook(_recorder(captured[name])) for name in captured]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def _recorder(into: list[Tensor]) -> Any:
    def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        into.append(inputs[0].detach())

    return record
