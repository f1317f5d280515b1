"""What a trained network is used for: reading a stream of any length, and generating."""

CHUNK = 16_384
"""Tokens that go through the network at a time, by default."""
