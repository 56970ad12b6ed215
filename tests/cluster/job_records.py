"""What a cluster's Job API tells of a job, read over plain HTTP."""

from __future__ import annotations

import json
import urllib.request

from tests.cluster.heads import TOKEN, Head


def runtime_environment(head: Head, submission_id: str) -> str:
    """Return the runtime environment of a job as JSON."""
    request = urllib.request.Request(
        f"{head.address}/api/jobs/{submission_id}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.dumps(json.load(answer)["runtime_env"])
