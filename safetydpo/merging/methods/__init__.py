"""Merge methods by family: every file ends with `METHODS`, its entries of the registry.

A new file here is a new method: the registry finds it (`docs/adding-a-merge-method.md`).
"""
