"""Devices that a worker can drive, behind one contract."""
