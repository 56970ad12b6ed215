"""Prompt sets: reading them, splitting them, choosing from them."""
