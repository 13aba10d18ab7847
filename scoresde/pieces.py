"""Tensors that lie in pieces over the processes of a group (torch's DTensor), and what is done to one whether it does or not."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["cut", "cut_state", "in_pieces", "local", "raw", "whole"]


def in_pieces(value: Any) -> bool:
    """Whether it is a DTensor; of which there is none before its module, which takes a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(value: Any) -> Any:
    """The piece of a tensor that this process has, in the same memory; what is in one piece as it is."""
    return value.to_local() if in_pieces(value) else value


def whole(value: Any) -> Any:
    """The whole tensor: a call of all processes, where it is in pieces."""
    return value.detach().full_tensor() if in_pieces(value) else value


def cut(value: Tensor, like: Tensor) -> Tensor:
    """In pieces as `like` is, of which this process keeps its own; nothing is sent, for every process has the whole."""
    if not in_pieces(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    known: Any = like
    value = value.detach().to(known.device)
    split = distribute_tensor(value, known.device_mesh, known.placements, src_data_rank=None)
    piece = split.to_local().clone()  # else it holds the memory of the whole
    return DTensor.from_local(piece, known.device_mesh, known.placements, run_check=False, shape=value.shape, stride=value.stride())


def cut_state(state: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """What an optimizer keeps of a parameter, its moments in pieces as the parameter is."""
    return {k: cut(v, like) if isinstance(v, Tensor) and v.shape == like.shape else v for k, v in state.items()}


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor that is in one piece, for a hash."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
