"""A device's memory: packed, pooled, filled from the file, and the cache of keys and values."""
