"""Predictors trained on what a model computes on a text.

record -> samples -> fit (objective, rounding) -> result; calibrate chooses thresholds, ranks chooses ranks.
"""
