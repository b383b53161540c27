"""Writing GGUF files: a plan of tensors streamed to the disk, all or nothing."""
