"""What sparsity costs in quality and gives in speed: one model at many sparsities, on one text."""
