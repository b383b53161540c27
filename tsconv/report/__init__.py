"""Activation statistics for people: numbers, figures, tables, and one page that holds them all."""
