"""The Python client: prompts in, completions out."""
