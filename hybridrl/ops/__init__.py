"""Python faces of the native kernels in csrc: one module an operation, CUDA or CPU by the tensors' device."""

from types import ModuleType


def native() -> ModuleType:
    """The compiled module hybridrl._C. ImportError, saying how to build it, where it is missing or does not load."""
    try:
        from hybridrl import _C
    except ImportError as error:
        raise ImportError(
            f"hybridrl's native kernels cannot be loaded ({error}). Build them in the checkout with `make setup`, or "
            "`pip install --no-build-isolation -e .` after `pip install cmake ninja pybind11`"
        ) from error
    return _C
