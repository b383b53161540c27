"""Placement of neurons on GPU, RAM and disk: cost model, solver, file (docs/placement.md)."""
