"""The public face of Redshard."""
