"""Prompts that try to bring an unsafe concept back: paraphrases, typos, and prompts found by gradient search."""
