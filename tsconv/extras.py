"""Large libraries that one command or option needs: extras of this package, imported when they are needed."""

from __future__ import annotations

import importlib

from tsconv.errors import TsconvError

# library -> the extra in pyproject.toml that installs it
EXTRAS = {"lm_eval": "eval", "matplotlib": "report", "pyarrow": "parquet", "torch": "separate-predictors"}


def require(library: str, what: str, extra: str | None = None) -> None:
    """Imports a library of EXTRAS, which `what` needs. `extra`: another one that installs it.

    Raises:
        TsconvError: it is missing or broken; says how to install it.
    """
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise TsconvError(
            f"{what} needs {library}, which cannot be imported ({error})",
            fix=f"install it: pip install 'tsconv[{extra or EXTRAS[library]}]'",
        ) from None
