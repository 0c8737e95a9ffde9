"""The bench: times as ratios of pairs that are taken in turns in one run, and as curves by size."""
