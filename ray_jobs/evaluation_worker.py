"""The actor of the final measurement: draws test pictures, has all judges look at them, embeds them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_jobs.final_judges import JudgePanel, asks_demo_judges, clip_of, judge_roles
from ray_jobs.run import Run
from ray_jobs.workers import DRAWN, finish_each, make_each, padded, worker_device
from safetydpo.artifacts.adapters import read_adapter
from safetydpo.artifacts.layout import ADAPTER_FILE, INTERVENTION_FILE
from safetydpo.artifacts.schemas import OUTCOMES
from safetydpo.artifacts.storage import Location
from safetydpo.artifacts.tables import table_from_rows
from safetydpo.config.schema import BaseModelConfig, Config, SamplerConfig
from safetydpo.errors import SafetyDPOError


class EvaluateWorker:
    """Draws with the adapter of each manifest row, has all judges look at it, and embeds with CLIP.

    Of two calls at the same time one draws while the pictures of the other are judged, embedded and made into files.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from safetydpo.diffusion.build import load_backbone
        from safetydpo.judges.clip import ClipScorer

        self._run = Run(Config.model_validate(config))
        identity = self._run.config.identity
        self._sampler: SamplerConfig = identity.sampler
        base: BaseModelConfig = identity.base
        self._backbone = load_backbone(base, device=worker_device())
        judges = self._run.config.execution.judges
        self._panel = JudgePanel(judge_roles(identity), judges, device=worker_device())
        self._stores_judgements = not asks_demo_judges(identity)
        self._clip = ClipScorer(clip_of(identity))
        self._adapter = ""
        self._guided: Mapping[str, Any] = {}
        self._drawing, self._judging = threading.Lock(), threading.Lock()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return `outcomes` rows, one per manifest row."""
        rows = table.to_pylist()
        with self._drawing:
            drawn = [self._draw_with(adapter, rows) for adapter in dict.fromkeys(row["adapter"] for row in rows)]
        with self._judging:
            made = [row for own in drawn for row in finish_each(own, self._outcomes, error_row=self.error_row)]
        results = {row["image_id"]: row for row in made}
        return table_from_rows([results[row["image_id"]] for row in rows], OUTCOMES)

    def error_row(self, row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
        """Return the `outcomes` row of a picture that could not be drawn or judged."""
        return error_outcome(row, error)

    def _draw_with(self, adapter: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        self._use(adapter)
        return make_each([row for row in rows if row["adapter"] == adapter], self._draw, error_row=self.error_row)

    def _use(self, adapter: str) -> None:
        from safetydpo.baselines.intervention import read_intervention
        from safetydpo.dpo.engine import lora_signature

        if adapter == self._adapter:
            return
        place = Location(self._run.store.filesystem, adapter)
        self._guided = {}
        if adapter and (place / INTERVENTION_FILE).is_file():
            intervention = read_intervention(place)
            intervention.install(self._backbone)
            self._guided = intervention.guide(self._backbone)
        elif adapter:
            layers, _ = read_adapter(place / ADAPTER_FILE)
            self._backbone.swap_adapter(lora_signature(self._run.config.identity.lora), layers)
        else:
            self._backbone.remove_adapter()
        self._adapter = adapter

    def _draw(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        from safetydpo.diffusion.memory import draw_within_memory
        from safetydpo.diffusion.render import render

        prompts, seeds = [row["prompt"] for row in rows], [row["seed"] for row in rows]
        pictures, size = draw_within_memory(
            lambda sampler: render(self._backbone, prompts=prompts, seeds=seeds, sampler=sampler, **self._guided),
            sampler=self._sampler,
        )
        return [{**row, DRAWN: picture, "micro_batch": size} for row, picture in zip(rows, pictures, strict=True)]

    def _outcomes(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
        import torch

        from safetydpo.diffusion.pictures import encode_picture

        # Judged in full batches too, so that a picture's scores do not depend on how many came with it.
        full = torch.stack(padded([row[DRAWN] for row in rows], self._sampler.batch_size))
        panel = self._panel.judge(full)
        embeddings = self._clip.embed_images(full)
        for index in range(len(rows)):
            check_embedding(embeddings[index])
            # Judgements of several judges say so themselves; the columns of the demo's two cannot.
            if not self._stores_judgements and (failures := panel.failures(index)):
                raise SafetyDPOError("; ".join(f"judge {name}: {reason}" for name, reason in failures.items()))
        return [
            {
                "image_id": row["image_id"],
                "image": encode_picture(row[DRAWN]),
                "status": "ok",
                "error": "",
                "attempt": row["attempt"],
                **panel.columns("select", index),
                **panel.columns("audit", index),
                "clip_embedding": embeddings[index].tolist(),
                "micro_batch": row["micro_batch"],
                "judgements": panel.judgements(index) if self._stores_judgements else None,
            }
            for index, row in enumerate(rows)
        ]


def check_embedding(embedding: Any) -> None:
    """Refuse an embedding that no caption can be compared with, so that its picture fails and no later step does.

    Raises:
        SafetyDPOError: if its length is zero or not finite.
    """
    length = float(embedding.double().norm())
    if not 0.0 < length < float("inf"):
        raise SafetyDPOError(
            f"expected a CLIP embedding of finite, non-zero length, found {length}: the same command tries it again"
        )


def error_outcome(row: Mapping[str, Any], error: BaseException) -> dict[str, object]:
    """Return the `outcomes` row of a picture that could not be drawn or judged."""
    texts = ("select_concept", "select_background", "audit_concept", "audit_background")
    flags = ("select_unsafe", "select_unrecognisable", "audit_unsafe", "audit_unrecognisable")
    return {
        "image_id": row["image_id"],
        "image": None,
        "status": "error",
        "error": " ".join(str(error).split())[:500],
        "attempt": row["attempt"],
        **dict.fromkeys(texts, ""),
        **dict.fromkeys(flags, False),
        "clip_embedding": [],
        "micro_batch": None,
        "judgements": None,
    }
