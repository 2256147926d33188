"""Where Megatron-core runs: on CUDA as it is, on the CPU through the one place that patches a third party.

Megatron-core names CUDA in many small ways: `torch.cuda.current_device()` as a device, `device="cuda"`, `.cuda()`,
`Tensor.type() == "torch.cuda.FloatTensor"`, streams, CUDA's RNG. `activate("cpu")` answers each of them with the CPU,
for the process (functions of `torch.cuda`) and for the calling thread (a `TorchFunctionMode`, which is thread-local:
every thread that runs Megatron code must call `activate`). On CUDA it selects the device and changes nothing else.
"""

import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode

_thread = threading.local()
_patched = False


class _NoStream:
    """What CUDA streams and events are on a CPU: already done."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class _CudaIsCpu(TorchFunctionMode):
    """Redirects tensors that ask for CUDA to the CPU and lets `Tensor.type()` say what Megatron compares with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


def _names_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _patch_process() -> None:
    """Points the functions of `torch.cuda` that Megatron calls at the CPU. Process-wide, once."""
    global _patched
    if _patched:
        return
    cpu = torch.device("cpu")

    def nothing(*args, **kwargs):
        return None

    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = nothing
    torch.cuda.empty_cache = nothing
    torch.cuda.set_device = nothing
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.Stream = _NoStream
    torch.cuda.Event = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.default_stream = _NoStream
    torch.cuda.current_stream = _NoStream
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state

    # Megatron keeps CUDA's generators by index and by name of the device; there is one generator here.
    from megatron.core.tensor_parallel import random as mp_random

    mp_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mp_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _patched = True


def activate(device: str) -> torch.device:
    """Readies the calling thread to run Megatron on `device` ("cpu" or "cuda:N") and returns that device."""
    target = torch.device(device)
    if target.type == "cpu":
        _patch_process()
        if not getattr(_thread, "active", False):
            _CudaIsCpu().__enter__()
            _thread.active = True
    else:
        torch.cuda.set_device(target)
    return target


def backend(device: torch.device) -> str:
    """The torch.distributed backend for `device`."""
    return "gloo" if device.type == "cpu" else "nccl"
