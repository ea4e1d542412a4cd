"""The blocks of a forward pass: each states its tensors' roles, its activations and its launches."""
