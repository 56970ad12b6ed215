"""ZeRO stage 3: the frozen denoiser's weights are shared out too, or wait in the host's memory.

DeepSpeed hooks every module of the denoiser: its weights are put together before its pass forward or back, and taken
apart after it. With `base_offload` they are taken from the host's memory one by one, and never lie on the device all at
once. A reference pass with the adapter off goes through the same hooks. The adapter itself is below the size
up to which parameters stay whole, so that it can be read and overwritten in place as everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safetydpo.config.training import TrainingConfig
from safetydpo.dpo.deepspeed_engine import DeepSpeedEngine
from safetydpo.dpo.loss_scale import LossScale


class _Denoiser(nn.Module):
    """The network with its adapter; as in `AdapterModule`, only the loss passes through."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class ShardedEngine(DeepSpeedEngine):
    """ZeRO stage 3 over the whole denoiser; only the adapter is trained.

    While it is open, every process must take part in every pass through the denoiser.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: Sequence[tuple[str, Tensor]],
        *,
        config: TrainingConfig,
        loss_scale: LossScale | None = None,
    ) -> None:
        """Take over the network and the named parameters of its installed adapter; every process must call it.

        Raises:
            SafetyDPOError: if there is no process group.
            UsageError: if another optimizer than AdamW is asked for.
        """
        self._network = network
        super().__init__(parameters, config=config, loss_scale=loss_scale)

    def _zero_settings(self) -> dict[str, Any]:
        whole = max(parameter.numel() for parameter in self._parameters.values())
        settings: dict[str, Any] = {"stage3_param_persistence_threshold": whole}
        if self._config.base_offload == "cpu":
            settings["offload_param"] = {"device": "cpu", "pin_memory": self._device.type != "cpu"}
        return settings

    @property
    def _device(self) -> torch.device:
        # That of the adapter: the network may wait in the host's memory.
        return next(iter(self._parameters.values())).device

    def _module(self, settings: Mapping[str, Any]) -> nn.Module:
        self._before = [(owner, set(vars(owner))) for owner in (*self._network.modules(), *self._network.parameters())]
        # ZeRO leaves them where they are once it has the weights.
        for buffer in self._network.buffers():
            buffer.data = buffer.data.to(self._device)
        # Here, because `initialize` would first put the whole network on the device; and without its replacement of
        # torch's linear function, which would stay in place for the whole process.
        self._deepspeed.zero.Init(
            module=self._network,
            config_dict_or_path=dict(settings),
            dtype=next(self._network.parameters()).dtype,
            mem_efficient_linear=False,
        )
        return _Denoiser(self._network)

    def _make_moments(self) -> None:
        self._put_together()
        super()._make_moments()

    def _put_together(self) -> None:
        apart = [one for one in self._parameters.values() if one.shape != one.ds_shape]  # type: ignore[attr-defined]
        if apart:
            apart[0].all_gather(param_list=apart)  # type: ignore[attr-defined]

    def _descend(self, learning_rate: float) -> float:
        norm = super()._descend(learning_rate)
        # An overflow leaves them apart.
        self._put_together()
        return norm

    def _overwrite(self, values: Mapping[str, Tensor]) -> None:
        chosen = [self._parameters[name] for name in values]
        with self._deepspeed.zero.GatheredParameters(chosen, modifier_rank=0):
            super()._overwrite(values)
        self._put_together()

    def close(self) -> None:
        """Destroy the DeepSpeed engine and make the network whole again, as it was before."""
        self._engine.destroy()
        values: dict[nn.Parameter, Tensor] = {}
        for parameter in self._network.parameters():
            with self._deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.data.clone()
            # A network that had to wait in the host's memory may be too large for the device.
            values[parameter] = whole.cpu() if self._config.base_offload == "cpu" else whole
        for owner, names in self._before:
            if isinstance(owner, nn.Module):
                owner._parameters = owner.__dict__.get("_original_parameters", owner._parameters)
            for name in set(vars(owner)) - names:
                delattr(owner, name)
        for parameter, value in values.items():
            parameter.data = value
