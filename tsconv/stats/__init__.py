"""Activation statistics: which neurons are hot, on what text."""
