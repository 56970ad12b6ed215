"""The frozen text-to-image model behind one protocol: schedules, adapter slot, sampling, pictures."""
