"""Predictors: made from what a model computes on a text, or from its weights."""
