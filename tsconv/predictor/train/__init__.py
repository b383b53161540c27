"""Predictors trained on what a model computes on a text.

trainer -> record -> samples -> fit (objective, rounding, calibrate) -> work -> sidecar; ranks chooses ranks.
"""
