"""Many GPUs: planning, scheduling, the pipeline of stages, and everything that talks to Ray or to people."""
