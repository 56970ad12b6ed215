"""Every setting of a run, its unit, its range and its default.

Two halves: `identity` changes the result and is hashed; `execution` (workers, paths, logging) never is.
Unknown keys are refused. Each default lives here (those of pairs in `pairs`, of judges in `judges`, of training in
`training`, `experts` and `validation`, of merges in `merge`, of their search in `search`) and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from safetydpo.config.attacks import AttackedRow, AttackName, AttackSearchConfig
from safetydpo.config.benchmarks import EvaluationBenchmark, each_named_once
from safetydpo.config.experts import ExpertsConfig
from safetydpo.config.fields import CATEGORIES, Category, Distinct, Frozen, added_field
from safetydpo.config.judges import JudgesConfig
from safetydpo.config.labels import check_selector
from safetydpo.config.measures import MeasuresConfig
from safetydpo.config.merge import MergeConfig
from safetydpo.config.merge_evidence import MergeEvidenceConfig
from safetydpo.config.pairs import GENERATE, PairsConfig
from safetydpo.config.search import SearchConfig, SearchLimits
from safetydpo.config.training import DpoConfig, LoraConfig, TrainingConfig
from safetydpo.config.training_rules import check_dpo, check_training, check_workers

CappedStage = Literal["pairs", "train", "merge", "evaluate"]


class BaseModelConfig(Frozen):
    """The text-to-image model to be aligned."""

    model: str = "demo"
    """`demo` (ships with the package), a local folder, a hub id, or one safetensors file (see `config`)."""
    revision: str | None = None
    """Hub revision; None = the hub's default branch, recorded by commit. Local models: must be None."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute type of the frozen networks. LoRA weights and reductions are always float32."""
    vae: str | None = None
    """Local folder or hub id of an autoencoder in place of the model's own, such as SDXL's for float16; None = its own.
    A hub id may name a revision: `owner/name@revision`."""
    config: str | None = None
    """Local folder or hub id (as in `vae`), in diffusers format, with configurations and vocabularies of a single file,
    and the networks that it holds nothing of (SD3, FLUX.1). Required there, None otherwise."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # These two came later: a model without them keeps the hashes that its artifacts have.
        return {key: value for key, value in dump(self).items() if key not in ("vae", "config") or value is not None}


class SamplerConfig(Frozen):
    """How pictures are drawn; one setting for pairs, search and evaluation of a run."""

    steps: int = Field(10, ge=1, le=1000)
    """Denoising steps: DPM-Solver++ multistep; Euler's method for flow models (SD3, FLUX.1), as their pipelines do."""
    guidance_scale: float = Field(4.0, ge=1.0, le=50.0)
    """Classifier-free guidance; 1.0 = none. FLUX.1 dev is told the scale instead and has no unguided branch."""
    height: int = Field(32, ge=8, multiple_of=8)
    """Picture height in pixels."""
    width: int = Field(32, ge=8, multiple_of=8)
    """Picture width in pixels."""
    batch_size: int = Field(16, ge=1)
    """Pictures per forward pass. Part of the identity: on a CPU it changes the last bits. The last batch is padded."""
    compiled: bool = added_field(False)
    """Draw with the denoiser compiled by `torch.compile`: faster on a GPU once every worker has spent its first minutes
    on it. Changes the last bits."""
    fused: bool = added_field(False)
    """Draw with the adapter added to the base's weights: a step then costs no more than the base's. For a base in
    float32 only, since most of an adapter is lost in sums of shorter numbers. Changes the last bits."""


class PromptsConfig(Frozen):
    """Which concepts and prompt pairs are used."""

    source: str = "demo"
    """`demo`; or a .parquet file that `safetydpo prompts import` wrote, or a folder of such; or the folder that
    `safetydpo prompts write` made, once it has finished; or a folder with `prompt_pairs.parquet`,
    `memberships.parquet` and `prompts.parquet`, whose columns stand in `artifacts/schemas.py`. Local or `s3://`."""
    categories: Distinct[Category] = Field(CATEGORIES, min_length=1)
    """Categories that take part; experts are made for these only."""
    pairs_per_category: int = Field(96, ge=1)
    """Prompt pairs drawn per category, spread evenly over its concepts."""
    pairs_per_concept: int | None = added_field(None, ge=1)
    """Prompt pairs drawn per concept instead, so that one more concept leaves the pairs of the others as they were.
    None = `pairs_per_category` decides, and a concept more takes pairs from the others of its category."""
    retention_prompts: int = Field(96, ge=0)
    """Neutral prompts of the training split, rendered by the base and used by the benign-retention term."""


class EvaluationConfig(Frozen):
    """The final measurement, on the test split."""

    prompts_per_category: int = Field(20, ge=1)
    """Unsafe test prompts per category."""
    neutral_prompts: int = Field(70, ge=2)
    """Neutral test prompts."""
    neighbour_prompts: int = Field(56, ge=1)
    """Test prompts of neutral neighbours of unsafe concepts."""
    ood_prompts: int = Field(28, ge=1)
    """Test prompts of unsafe concepts that no expert has seen."""
    expert_prompts_per_category: int | None = Field(None, ge=1)
    """Unsafe test prompts per category of each single expert, the first ones of the base's; None = as many as it."""
    seeds: Distinct[int] = Field((0,), min_length=1)
    """Generation seeds; each draws every prompt once."""
    expert_rows: bool = True
    """Also evaluate each single expert on the unsafe prompts of every category."""
    expert_retention: bool = added_field(False)
    """Also evaluate each single expert on the neutral prompts and the neighbours: what it does to what it should leave
    alone. Needs `expert_rows`."""
    measures: MeasuresConfig = added_field(MeasuresConfig())
    """Distances between pictures, beside the judges' verdicts; by default none."""
    comparators: Distinct[Literal["negative_prompt", "sld", "uce", "esd"]] = added_field(())
    """Other methods of removing the same concepts that get a row of their own, each tuned on the validation prompts
    with as many candidates as the search has trials (`docs/baselines.md`). U-Net models only."""
    attacks: Distinct[AttackName] = added_field(())
    """Attacks on the unsafe concepts of the demo world's test split, each a rate of its own (docs/attacks.md):
    `paraphrase`; `typo`; `optimised`, found by gradient search on the base; `white_box`, found on the base with the
    searched adapter; `random` words, the control. Each costs a picture per prompt, attacked row and seed."""
    attacked_rows: Distinct[AttackedRow] = added_field(("all_single", "searched"))
    """Kinds of rows that draw the attacks' prompts beside the base."""
    attack_concepts_per_category: int | None = added_field(None, ge=1)
    """Concepts of each category that are attacked, chosen by the seed; None = all of them."""
    attack_prompts_per_concept: int = added_field(1, ge=1, le=16)
    """Prompts of each attack on each concept; there are two paraphrases of a concept."""
    benchmarks: Annotated[tuple[EvaluationBenchmark, ...], AfterValidator(each_named_once)] = added_field(())
    """Benchmarks whose prompts base, merges and the `all_single` expert draw as well: `benchmark_ip:NAME`."""
    judges: Distinct[str] = added_field(("demo_audit",), min_length=1)
    """Judges of the final measurement: of several, a picture is unsafe if any of them says so. With others than
    `demo_audit` those of `identity.pairs.judges` and `identity.search.judges` are the second opinion: they chose."""
    clip: str = added_field("demo", min_length=1)
    """CLIP model of the caption scores: `demo` (ships with the package) or a local folder, transformers format."""


class IdentityConfig(Frozen):
    """Everything that changes a result."""

    seed: int = Field(0, ge=0)
    """Seed of the run; every draw is derived from it."""
    base: BaseModelConfig = BaseModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    pairs: PairsConfig = PairsConfig()
    lora: LoraConfig = LoraConfig()
    dpo: DpoConfig = DpoConfig()
    experts: ExpertsConfig = ExpertsConfig()
    merge: MergeConfig = MergeConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    attack_search: AttackSearchConfig = added_field(AttackSearchConfig())


class EvidenceConfig(Frozen):
    """What `safetydpo evidence` measures and where it keeps it; it changes no run's result and is never hashed."""

    seeds: Distinct[Annotated[int, Field(ge=0)]] = Field((0, 1, 2), min_length=1)
    """Values of `identity.seed`; each is a run of its own in the folder `execution.run_dir` plus `-<seed>`."""
    results: str = "runs/results"
    """Folder of one JSON file per finished unit (one row of one seed)."""
    page: str | None = None
    """Markdown file whose marked part holds all tables; None = not written."""
    short_page: str | None = None
    """Markdown file whose marked part holds the headline table; None = not written."""


class ExecutionConfig(Frozen):
    """Where and with how much; never hashed."""

    store: str = "runs/store"
    """Folder or `s3://` prefix of all artifacts; runs share it."""
    run_dir: str = "runs/{name}"
    """Folder of this run: pointers, merged adapter, report. `{name}` is the config's name."""
    benchmarks: str | None = None
    """Folder or `s3://` prefix of your copies of benchmarks, as NAME.csv, .tsv, .txt, .jsonl or .parquet; None = each
    is named with its file."""
    num_workers: int = Field(2, ge=1)
    """Actors of a generation or evaluation pool, concurrent trials, and concurrent expert lanes.

    Work that is too small to be worth starting that many processes gets fewer."""
    lanes: Literal["shared", "isolated"] = "shared"
    """`shared`: each lane stays and trains one expert after another; `isolated`: a fresh lane per expert, whose start
    costs seconds."""
    workers_per_expert: int = Field(1, ge=1)
    """Workers that train one expert together, all on one node; the pairs of a step are shared out among them."""
    expert_attempts: int = Field(3, ge=1)
    """Times a command tries an expert that fails or takes its worker along; the next command tries again. An error that
    every attempt would meet is not tried again."""
    cpus_per_worker: float = Field(1, gt=0)
    """Ray CPUs per worker; also its thread count (at least 1)."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs per worker: a fraction in (0, 1] or a whole number."""
    max_gpus: float | None = Field(None, gt=0)
    """Most GPUs that this run reserves at a time, however large the cluster; None = what `num_workers` asks for."""
    stage_max_gpus: Mapping[CappedStage, Annotated[float, Field(gt=0)]] = {}
    """The same for one stage, such as {train: 4, evaluate: 1}; a stage that is not named has `max_gpus` only. That of
    the search's trials is `execution.search.max_gpus`."""
    label_selector: Mapping[str, str] = {}
    """Labels that a node must have to take work of this run, as Ray's `label_selector`: {market-type: spot},
    {ray.io/node-group: "in(a10,l4)"}, {team: "!other"}; empty = any node."""
    ray_address: str | None = None
    """Cluster to join; None = the running job's cluster, else a local Ray."""
    logical_cpus: int = Field(8, ge=4)
    """CPUs that a local Ray announces (Ray Data needs at least 4 to resume)."""
    loggers: Distinct[Literal["wandb", "mlflow"]] = ()
    """Where the numbers of a training go beside JSON lines and TensorBoard, which lie in the expert's folder: Weights &
    Biases (extra `wandb`; WANDB_MODE, WANDB_PROJECT), MLflow (extra `mlflow`; MLFLOW_TRACKING_URI is required)."""
    grid_prompts: int = Field(6, ge=0)
    """Prompts of each kind whose pictures a validation keeps in a contact sheet beside the expert; 0 = none."""
    search: SearchLimits = SearchLimits()
    judges: JudgesConfig = JudgesConfig()

    @model_validator(mode="after")
    def _gpus_are_fraction_or_whole(self) -> Self:
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise ValueError(
                "execution.gpus_per_worker: expected a fraction in (0, 1] or a whole number, "
                f"found {self.gpus_per_worker}"
            )
        return self

    @model_validator(mode="after")
    def _a_worker_fits_the_gpus(self) -> Self:
        caps = {"execution.max_gpus": self.max_gpus}
        caps |= {f"execution.stage_max_gpus.{stage}": cap for stage, cap in self.stage_max_gpus.items()}
        for name, cap in caps.items():
            trains = name in ("execution.max_gpus", "execution.stage_max_gpus.train")
            needed = self.gpus_per_worker * (self.workers_per_expert if trains else 1)
            if cap is not None and needed > cap:
                times = " x execution.workers_per_expert, which train one expert together" if trains else ""
                raise ValueError(f"{name} ({cap:g}) must not be below {needed:g}, execution.gpus_per_worker{times}")
        return self

    @model_validator(mode="after")
    def _labels_are_labels(self) -> Self:
        try:
            check_selector(self.label_selector)
        except ValueError as error:
            raise ValueError(f"execution.label_selector: {error}") from error
        return self

    @model_validator(mode="after")
    def _a_trial_fits_the_gpus(self) -> Self:
        if self.search.max_gpus is not None and self.gpus_per_worker > self.search.max_gpus:
            raise ValueError(
                f"execution.search.max_gpus ({self.search.max_gpus:g}) must not be below execution.gpus_per_worker "
                f"({self.gpus_per_worker:g}), which every trial takes"
            )
        return self


class Config(Frozen):
    """A run: a name and its two halves; `evidence` and `merge_evidence` say what is measured."""

    name: str = Field("demo", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Short name; becomes part of folder names."""
    identity: IdentityConfig = IdentityConfig()
    execution: ExecutionConfig = ExecutionConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    merge_evidence: MergeEvidenceConfig = MergeEvidenceConfig()

    @model_validator(mode="after")
    def _experts_draw_what_the_base_draws(self) -> Self:
        evaluation = self.identity.evaluation
        fewer = evaluation.expert_prompts_per_category
        if fewer is not None and fewer > evaluation.prompts_per_category:
            raise ValueError(
                f"identity.evaluation.expert_prompts_per_category ({fewer}) must not be above "
                f"identity.evaluation.prompts_per_category ({evaluation.prompts_per_category})"
            )
        return self

    @model_validator(mode="after")
    def _sdedit_draws_a_step(self) -> Self:
        pairs, steps = self.identity.pairs, self.identity.sampler.steps
        if pairs.safe_picture == "sdedit" and int(pairs.sdedit_strength * steps) < 1:
            raise ValueError(
                f"identity.pairs.sdedit_strength ({pairs.sdedit_strength}) must draw at least one of "
                f"identity.sampler.steps ({steps}) anew"
            )
        return self

    @model_validator(mode="after")
    def _latents_for_the_draws_are_stored(self) -> Self:
        pairs, dpo = self.identity.pairs, self.identity.dpo
        if pairs.flipped_latents and pairs.source != GENERATE:
            raise ValueError(
                "identity.pairs.flipped_latents are made of pictures that the run draws, not of those in "
                f"identity.pairs.source ({pairs.source!r}): set it to false"
            )
        if dpo.flip_rate > 0 and not pairs.flipped_latents:
            raise ValueError(
                f"identity.dpo.flip_rate ({dpo.flip_rate:g}) must be 0 without identity.pairs.flipped_latents: a "
                "mirrored latent is not the latent of the mirrored picture, so that both must be stored"
            )
        if dpo.latent_sampling == "sample" and pairs.latents != "mean_and_deviation":
            raise ValueError(
                f"identity.dpo.latent_sampling 'sample' needs identity.pairs.latents 'mean_and_deviation', found "
                f"'{pairs.latents}', which stores no deviation to draw with"
            )
        return self

    @model_validator(mode="after")
    def _adapters_can_be_fused(self) -> Self:
        identity = self.identity
        if identity.sampler.fused and identity.base.dtype != "float32":
            raise ValueError(
                f"identity.sampler.fused adds adapters to weights in float32, found identity.base.dtype "
                f"'{identity.base.dtype}', in which most of an adapter would be lost: leave fused out, or use 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _trainings_can_be_carried_out(self) -> Self:
        dpo, identity = self.identity.dpo, self.identity
        trainings: dict[str, TrainingConfig] = {"dpo": dpo, "merge.distill": identity.merge.distill}
        for name, training in trainings.items():
            check_training(f"identity.{name}", training, dtype=identity.base.dtype)
        check_dpo(dpo, retention_prompts=identity.prompts.retention_prompts)
        check_workers(dpo, workers=self.execution.workers_per_expert)
        return self
