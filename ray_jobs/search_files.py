"""Names of the files in the folder of a search beside its logs."""

PROGRESS_FILE = "progress.json"
"""What somebody who watches a search must know beside its logs."""
BASE_FILE = "base.json"
"""Rates of the base in full."""
BASE_RUNGS_FILE = "base-rungs.json"
"""Rates of the base at the rungs that sample, by rung."""
