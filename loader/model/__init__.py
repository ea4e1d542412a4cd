"""What a model is made of: hyperparameters, tensors by role, rotary tables."""
