"""Predictors: made from what a model computes on a text, or from its weights."""

TARGET_MISS = 0.0003  # share of an FFN's output that predictors may miss, unless another is asked for
