"""What went wrong while llama.cpp loaded a model."""

from __future__ import annotations

from pathlib import Path

from tsconv.errors import BackendError, ModelFileError, TsconvError
from tsconv.native.log import OWN
from tsconv.runtime.offload import Offload


def load_error(error: Exception, errors: list[str], path: Path, n_ctx: int, offload: Offload) -> TsconvError:
    """What llama_cpp.Llama's constructor says, and llama.cpp's error lines, in one line."""
    fewer = "; or put fewer layers on the GPU (-ngl)" if offload.n_gpu_layers else ""
    reason = next((line for line in errors if line), str(error) or "no memory")
    if reason.startswith(OWN):
        return BackendError(reason.removeprefix(OWN))
    if isinstance(error, MemoryError) or "llama_context" in str(error) or "llama_batch" in str(error):
        return BackendError(
            f"llama.cpp cannot make a context of {f'{n_ctx} tokens' if n_ctx else 'the length that the model has'}",
            where=path,
            found=reason,
            fix=f"lower it with -c (n_ctx){fewer}",
        )
    if "Failed to" not in str(error):  # an argument that llama_cpp.Llama does not take
        return TsconvError(str(error), where=path)
    if "alloc" in reason or "out of memory" in reason:
        return BackendError(
            "no memory for the model",
            where=path,
            found=reason,
            fix=f"close other programs, or convert with a smaller --outtype{fewer}",
        )
    fix = "convert again, or look at llama.cpp's log: tsconv run -v, or verbose=True"
    return ModelFileError("llama.cpp cannot load the model", where=path, found=reason, fix=fix)
