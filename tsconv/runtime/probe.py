"""Lets llama.cpp, without the sparse backend, compute a prompt: `python -m tsconv.runtime.probe`.

Its quantized matrix kernels for several tokens are compared with those for one token: a tiny random q8_0 model computes
40 tokens in one batch and one by one. Prints the difference of the logits (squared error over squared size). To be run
in a process of its own: kernels that the compiler got wrong end it by a signal.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# AMX kernels (ggml/src/ggml-cpu/amx) want rows of a multiple of 32 weights, a multiple of 32 rows, and two tokens.
N = 64  # n_embd, n_ff, n_vocab
N_TOKENS = 40
Q8_0 = gguf.GGMLQuantizationType.Q8_0
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_model(path: Path) -> None:
    """One llama layer of random weights without a vocabulary, 50 kB."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(N)
    writer.add_context_length(N)
    writer.add_block_count(1)
    writer.add_embedding_length(N)
    writer.add_feed_forward_length(N)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ("token_embd", "output", *(f"blk.0.{matrix}" for matrix in MATRICES)):
        weights = rng.standard_normal((N, N), dtype=np.float32) / N**0.5
        writer.add_tensor(f"{name}.weight", gguf.quantize(weights, Q8_0), raw_dtype=Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(N, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(path: Path, n_batch: int) -> np.ndarray:
    """float32 [N_TOKENS, N]"""
    llama = llama_cpp.Llama(str(path), n_ctx=N, n_batch=n_batch, n_threads=2, logits_all=True, verbose=False)
    llama.eval(list(range(N_TOKENS)))
    return llama.scores[:N_TOKENS].copy()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tsconv-probe-") as directory:
        write_model(path := Path(directory) / "probe.gguf")
        single, batch = logits(path, 1), logits(path, N_TOKENS)
    print(float(((batch - single) ** 2).sum() / (single**2).sum()))


if __name__ == "__main__":
    main()
