"""Align text-to-image models with many small safety experts, merged into one LoRA adapter."""

__version__ = "0.1.0"
