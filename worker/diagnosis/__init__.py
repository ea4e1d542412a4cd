"""What works on a GPU, tried; and troubles that are known."""
