"""Nested states between processes: tensors become numpy arrays on the way out and tensors again on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def plain_state(state: Any) -> Any:
    """The same nesting with numpy arrays for tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().numpy()
    if isinstance(state, Mapping):
        return {key: plain_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain_state(value) for value in state]
    return state


def tensor_state(state: Any) -> Any:
    """The same nesting with tensors for numpy arrays. Always copies: what Ray hands over is read-only and shared."""
    if isinstance(state, np.ndarray):
        return torch.tensor(state)
    if isinstance(state, Mapping):
        return {key: tensor_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [tensor_state(value) for value in state]
    return state
