"""The part of a model that a device runs: recorded once, replayed for every step."""
