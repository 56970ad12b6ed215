"""Which modules have the shapes of their tensors checked while tests run, and why others that name shapes have not."""

from __future__ import annotations

CHECKED_MODULES = (
    "safetydpo.artifacts.adapters",
    "safetydpo.attacks.swaps",
    "safetydpo.attacks.vocabulary",
    "safetydpo.baselines.closed_form",
    "safetydpo.baselines.guidance",
    "safetydpo.diffusion.schedule",
    "safetydpo.dpo.batch",
    "safetydpo.dpo.draws",
    "safetydpo.dpo.loss",
    "safetydpo.dpo.stored_errors",
    "safetydpo.dpo.variants",
    "safetydpo.evaluation.compare",
    "safetydpo.evaluation.counts",
    "safetydpo.evaluation.damage",
    "safetydpo.evaluation.distances",
    "safetydpo.evaluation.feature_metrics",
    "safetydpo.evaluation.inception_distances",
    "safetydpo.evaluation.judge_rates",
    "safetydpo.evaluation.metrics",
    "safetydpo.evaluation.rows",
    "safetydpo.judges.clip_vision",
    "safetydpo.judges.layered_distance",
    "safetydpo.judges.multiheaded",
    "safetydpo.judges.nudenet",
    "safetydpo.judges.q16",
    "safetydpo.merging.algebra",
    "safetydpo.merging.methods",
    "safetydpo.merging.moments",
    "safetydpo.merging.overlap",
    "safetydpo.merging.votes",
    "safetydpo.pairs.concepts",
    "safetydpo.pairs.layout",
    "safetydpo.pairs.select",
    "safetydpo.search.recognition",
    "safetydpo.seeding",
    "safetydpo.statistics",
)
"""Every call of these checks its tensors against the annotated axes; a package stands for its modules."""

TAKES_A_PROTOCOL = (
    "beartype refuses functions that take a Protocol that is not runtime-checkable (Backbone, Engine, FeatureNetwork); "
    "making it so would check attribute names at every call and no shape"
)
RUNS_A_NETWORK = "shapes of what goes into a network and comes out of it, which refuses wrong ones itself"
DRAWS_OR_TRAINS = "draws or trains the demo world, once, by a script that checks what it made"
ASKS_CHECKED = "its formulas are those of a checked module (diffusion.schedule)"
HANDS_ON = "hands pictures or states on, in another form at most, and computes nothing from them"

UNCHECKED_MODULES = {
    "safetydpo.attacks.objectives": TAKES_A_PROTOCOL,
    "safetydpo.attacks.search": TAKES_A_PROTOCOL,
    "safetydpo.baselines.esd": TAKES_A_PROTOCOL,
    "safetydpo.baselines.uce": TAKES_A_PROTOCOL,
    "safetydpo.demo.check": DRAWS_OR_TRAINS,
    "safetydpo.demo.drawings": DRAWS_OR_TRAINS,
    "safetydpo.demo.features": DRAWS_OR_TRAINS,
    "safetydpo.demo.judge_data": DRAWS_OR_TRAINS,
    "safetydpo.demo.sampling": DRAWS_OR_TRAINS,
    "safetydpo.demo.train_judges": DRAWS_OR_TRAINS,
    "safetydpo.demo.train_text": DRAWS_OR_TRAINS,
    "safetydpo.demo.train_unet": DRAWS_OR_TRAINS,
    "safetydpo.demo.train_vae": DRAWS_OR_TRAINS,
    "safetydpo.diffusion.backbone": HANDS_ON,
    "safetydpo.diffusion.contact_sheet": HANDS_ON,
    "safetydpo.diffusion.flux": RUNS_A_NETWORK,
    "safetydpo.diffusion.given_pictures": HANDS_ON,
    "safetydpo.diffusion.latent_model": RUNS_A_NETWORK,
    "safetydpo.diffusion.memory": RUNS_A_NETWORK,
    "safetydpo.diffusion.pictures": HANDS_ON,
    "safetydpo.diffusion.process": ASKS_CHECKED,
    "safetydpo.diffusion.render": TAKES_A_PROTOCOL,
    "safetydpo.diffusion.sdxl": RUNS_A_NETWORK,
    "safetydpo.diffusion.stable_diffusion": RUNS_A_NETWORK,
    "safetydpo.diffusion.text": RUNS_A_NETWORK,
    "safetydpo.dpo.checkpoint": HANDS_ON,
    "safetydpo.dpo.descent": TAKES_A_PROTOCOL,
    "safetydpo.dpo.distillation": TAKES_A_PROTOCOL,
    "safetydpo.dpo.distiller": TAKES_A_PROTOCOL,
    "safetydpo.dpo.held_out": TAKES_A_PROTOCOL,
    "safetydpo.dpo.reference": TAKES_A_PROTOCOL,
    "safetydpo.dpo.step": TAKES_A_PROTOCOL,
    "safetydpo.dpo.watch": HANDS_ON,
    "safetydpo.dpo.weighting": TAKES_A_PROTOCOL,
    "safetydpo.judges.clip": RUNS_A_NETWORK,
    "safetydpo.judges.convolutions": RUNS_A_NETWORK,
    "safetydpo.judges.demo_network": RUNS_A_NETWORK,
    "safetydpo.judges.features": TAKES_A_PROTOCOL,
    "safetydpo.judges.inception": RUNS_A_NETWORK,
    "safetydpo.judges.perceptual": RUNS_A_NETWORK,
    "safetydpo.judges.picture_files": HANDS_ON,
    "safetydpo.judges.q16_pickle": HANDS_ON,
    "safetydpo.judges.shieldgemma": RUNS_A_NETWORK,
    "safetydpo.merging.activations": TAKES_A_PROTOCOL,
    "safetydpo.search.proxy": TAKES_A_PROTOCOL,
}
"""Modules that name shapes and are not checked, each with the reason."""
