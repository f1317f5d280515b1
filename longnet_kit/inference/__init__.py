"""What a trained network is used for: reading a stream of any length, and generating."""
