"""Parameters -> optimizer, steps -> learning rate."""
