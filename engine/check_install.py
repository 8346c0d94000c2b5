"""Whether `triton_kernels` is ours. Another distribution brings a package of that name, and Python takes whichever it finds first."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

EXPECTED = Path(__file__).parents[1] / "triton_kernels"  # both packages are one distribution, or one checkout


def check_kernels() -> None:
    """Raise ImportError where `import triton_kernels` would bring another package than the one beside this engine, or a mixture.

    Nothing is imported to find out: what would be may break, or half work, for both have a `swiglu`.
    """
    spec = find_spec("triton_kernels")
    if spec is None:
        return  # to import it will say so
    found = Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations or ("",)))) / "__init__.py"
    if found.parent.resolve() != EXPECTED.resolve():
        way_out = f"put {EXPECTED.parent} before it on PYTHONPATH, or uninstall the other one"
    elif not found.is_file() or "linear_policy_loss" not in found.read_text():
        way_out = "it was installed over ours: uninstall the other one, then install trivet again"
    else:
        return
    others = sorted({*packages_distributions().get("triton_kernels", ())} - {"trivet"})
    whose = f"that of {', '.join(others)}" if others else "another"
    raise ImportError(f"triton_kernels at {found.parent} is not the package of trivet but {whose}; {way_out}")
