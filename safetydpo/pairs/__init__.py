"""Room 1: from prompt pairs to preferences: which pictures to draw, and which pairs are good enough."""
