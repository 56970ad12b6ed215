"""Published ways to remove concepts, behind one protocol: what the project's own adapters are compared with."""
