"""Requests in, steps out, tokens in, text out: scheduling and the run loop. Knows no Ray."""
