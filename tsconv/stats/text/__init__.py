"""Calibration text: where it comes from, and its packing into chunks of tokens."""
