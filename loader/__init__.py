"""From a GGUF file to what a GPU needs; knows nothing of devices or Ray."""
