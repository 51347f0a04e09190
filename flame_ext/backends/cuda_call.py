"""How PyTorch tensors reach a CUDA kernel: checked addresses, the current stream, a workspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame_ext.scalars import Scalar


def rows_pointer(tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> tuple[int, int]:
    """Address and row distance, in floats, of rows or of a column that may lie in wider rows.

    Raises:
        ValueError: If the tensor is not what the kernel assumes.
    """
    distance = tensor.stride(0)
    if tensor.dim() == 2 and tensor.stride(1) != 1:
        raise ValueError(f"rows of shape {tuple(tensor.shape)} are not contiguous")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"a tensor has shape {tuple(tensor.shape)}; expected {shape}")
    return pointer(tensor[:1].reshape(-1), like=like), distance


def device_scalar(value: Scalar, like: Tensor) -> Tensor:
    """A float64 of no dimension where `like` is, `value` itself if it is one."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)


def stream(tensor: Tensor) -> int:
    """The stream that PyTorch currently uses on the tensor's device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def run_with_workspace(function: Any, like: Tensor, *args: Any) -> Tensor:
    """Calls a kernel function on `like`'s device and current stream with the memory it asks for.

    Returns:
        That memory.
    """
    with torch.cuda.device(like.device):
        size = function(*args, 0, 0)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=like.device)
        function(*args, workspace.data_ptr(), stream(like))
    return workspace


def pointer(tensor: Tensor | None, shape: Any = None, like: Tensor | None = None) -> int:
    """Address of a dense float32 CUDA tensor.

    Args:
        tensor: What a kernel reads or writes.
        shape: The shape that it must have.
        like: A tensor on whose device it must be.

    Raises:
        ValueError: If the tensor is not what the kernel assumes.
    """
    if tensor is None:
        raise ValueError("a kernel needs a tensor here, got None")
    device = tensor.device if like is None else like.device
    if tensor.device != device or device.type != "cuda" or tensor.dtype != torch.float32:
        raise ValueError(
            f"the CUDA kernels take torch.float32 on {device}; got {tensor.dtype} on "
            f"{tensor.device}"
        )
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"a tensor has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    return int(tensor.data_ptr())
