"""Side-by-side measurements: each prints one JSON object with ratios as its last line."""
