"""Evaluation: from judged pictures to metrics, summary.json and the report."""
