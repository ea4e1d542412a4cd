"""The stages of a model as Ray actors: planned, placed, connected, and replaced when they die."""
