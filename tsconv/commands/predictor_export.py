"""`predictor export`: a sidecar's predictors as a folder of `model_N.pt`, the layout of PowerInfer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tsconv.errors import OutputError, TsconvError
from tsconv.extras import require
from tsconv.format.header import read_header
from tsconv.format.order import CHECKPOINT, kind_of, shape_of
from tsconv.format.pair import check_keys, is_sidecar
from tsconv.predictor.train.sidecar import read_matrices


def export(sidecar: str | Path, out: str | Path) -> list[Path]:
    """Writes a state dict for each layer, `fc1.weight` [r, n_embd] and `fc2.weight` [n_ff, r] in half precision, and
    config.json with the `sparse_threshold` that logits must pass and, in `predictor_input`, what the predictors read.

    All or nothing: the folder appears when all files are in it.

    Args:
        sidecar: NAME.predictor.gguf of a dense model.
        out: the folder, which must not exist.

    Returns:
        the state dicts.

    Raises:
        TsconvError: no torch; predictors of experts, of neurons in another order, or with several thresholds.
        ModelFileError: the sidecar is missing or damaged.
        OutputError: the folder exists or cannot be written.
    """
    require("torch", "writing separate predictors", "train")
    import torch

    path, folder = Path(sidecar), Path(out)
    header = read_header(path)
    if not is_sidecar(header):
        raise TsconvError("not a predictor sidecar", where=path, fix="name a NAME.predictor.gguf")
    check_keys(header)
    if header.keys.get("llama.expert_count"):
        raise TsconvError("the layout has one predictor for each layer", where=path, found="those of experts")
    if kind_of(header) != CHECKPOINT:
        fix = "take the sidecar of the model before tsconv reorder"
        raise TsconvError("its neurons are not in the checkpoint's order", where=path, fix=fix)
    thresholds = sorted(set(header.keys["turbosparse.predictor.threshold"]))
    if len(thresholds) != 1:
        raise TsconvError("the layout has one threshold for all layers", where=path, found=thresholds)
    if folder.exists():
        raise OutputError("output exists", where=folder, fix="choose another name")
    part = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for n in range(shape_of(header)[0]):
            fc1, fc2 = (torch.from_numpy(w.copy()).half() for w in read_matrices(header, n, 0))
            torch.save({"fc1.weight": fc1, "fc2.weight": fc2}, part / f"model_{n}.pt")
        config = {
            "sparse_threshold": int(thresholds[0]) if thresholds[0].is_integer() else thresholds[0],
            "predictor_input": header.keys["turbosparse.predictor.input"],
        }
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        part.rename(folder)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot be written: {getattr(error, 'strerror', None) or error}", where=folder) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(folder.glob("model_*.pt"))
