"""Predictors from the weights alone: what stands for gate and up (kinds), and margins chosen on a text (calibrate)."""
