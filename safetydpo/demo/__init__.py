"""The demo world: a small, real text-to-image model trained on drawings, and its judges."""
