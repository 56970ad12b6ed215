"""Room 2: one safety expert (a LoRA) per group of preferences, trained by Diffusion-DPO."""
