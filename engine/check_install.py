"""Checks that `triton_kernels` is Trivet's: the distribution triton-kernels has a package of the same name, and the first is imported."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

EXPECTED = Path(__file__).parents[1] / "triton_kernels"  # both packages are one distribution, or one checkout


def check_kernels() -> None:
    """Raise ImportError if `import triton_kernels` would import another package than the one installed with this engine, or a mixture.

    The check imports nothing: the other package may fail to import, or work in part, because both have a `swiglu`.
    """
    spec = find_spec("triton_kernels")
    if spec is None:
        return  # importing it raises a clear error
    init = Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations or ("",)))) / "__init__.py"
    if init.parent.resolve() != EXPECTED.resolve():
        fix = f"put {EXPECTED.parent} before it on PYTHONPATH, or uninstall the other one"
    elif not init.is_file() or "linear_policy_loss" not in init.read_text():
        fix = "it was installed over trivet's: uninstall the other one, then install trivet again"
    else:
        return
    others = sorted({*packages_distributions().get("triton_kernels", ())} - {"trivet"})
    owner = f"that of {', '.join(others)}" if others else "another"
    raise ImportError(f"triton_kernels at {init.parent} is not the package of trivet but {owner}; {fix}")
