"""Which neurons are hot, on what text, and where they should live."""
