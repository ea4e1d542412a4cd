"""What a model is made of: layers as data, tensors by role, cache groups, rotary tables."""
