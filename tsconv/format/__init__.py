"""What our files are: the GGUF header, the keys, layouts and neuron order of models and sidecars (docs/format.md)."""
