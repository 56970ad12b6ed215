"""Search for the best merge: its space, its objective, its guard and its replay."""
