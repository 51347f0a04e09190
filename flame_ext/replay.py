"""Uniform replay with one row per transition, so that a batch is one gather."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flame_ext.errors import FlameError


@dataclass(frozen=True)
class Batch:
    """Transitions; `discount` is what the value of `next_obs` counts.

    It is 0 where the episode ended by itself, gamma elsewhere, at time limits too (Pardo et al.
    2018).
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_obs: Tensor

    def __len__(self) -> int:
        return len(self.obs)

    def columns(self) -> list[Tensor]:
        """The fields' tensors, in their order."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def split(self, parts: int) -> list[Batch]:
        """Equal parts, in order.

        Raises:
            ValueError: If the batch does not divide.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(f"a batch of {len(self)} transitions has no {parts} equal parts")
        chunks = (column.chunk(parts) for column in self.columns())
        return [Batch(*part) for part in zip(*chunks, strict=True)]


class ReplayBuffer:
    """A ring of float32 rows ``[obs | next_obs | action | reward | terminated]``.

    Args:
        capacity: Rows kept; memory is reserved at once but touched only as it fills.
        obs_dim: O.
        action_dim: A.
        device: Where the rows live.

    Raises:
        FlameError: If the memory is not there.
    """

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        self._columns = (obs_dim, obs_dim, action_dim, 1, 1)
        width = sum(self._columns)
        try:
            self._rows = torch.empty((capacity, width), device=device)
        except RuntimeError as error:
            raise FlameError(
                f"buffer_size={capacity:,} transitions of {obs_dim} observations and {action_dim} "
                f"actions need {4e-9 * capacity * width:,.1f} GB, which {device} does not give; "
                "lower buffer_size"
            ) from error
        self._next = 0
        self.size = 0

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return len(self._rows)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        next_obs: np.ndarray,
    ) -> None:
        """Appends n <= capacity transitions over the oldest; arrays ``(n, ...)``."""
        columns = [obs, next_obs, action, reward[:, None], terminated[:, None]]
        rows = torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.float32))
        first, end = self._next, self._next + rows.shape[0]
        beyond = max(end - self.capacity, 0)
        self._rows[first : end - beyond] = rows[: end - beyond - first]
        if beyond:
            self._rows[:beyond] = rows[-beyond:]
        self._next = end % self.capacity
        self.size = min(self.size + rows.shape[0], self.capacity)

    def sample(self, batch_size: int, generator: torch.Generator, gamma: float) -> Batch:
        """`batch_size` transitions drawn uniformly with replacement, discounted by `gamma`.

        Raises:
            ValueError: If the buffer is empty.
        """
        if self.size == 0:
            raise ValueError("the replay buffer is empty: collect transitions before sampling")
        index = torch.randint(
            self.size, (batch_size,), generator=generator, device=self._rows.device
        )
        rows = self._rows.index_select(0, index)
        obs, next_obs, action, reward, terminated = rows.split_with_sizes(self._columns, dim=1)
        return Batch(obs, action, reward.squeeze(1), gamma * (1 - terminated.squeeze(1)), next_obs)

    def state_dict(self) -> dict[str, Tensor]:
        """The filled rows and the write position."""
        return {
            "rows": self._rows[: self.size],
            "next": torch.tensor(self._next),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: If the rows do not fit this buffer.
        """
        rows = state["rows"]
        if rows.shape[1:] != self._rows.shape[1:] or len(rows) > self.capacity:
            raise ValueError(
                f"saved replay rows have shape {tuple(rows.shape)}, this buffer holds "
                f"{tuple(self._rows.shape)}: was it made for another environment or buffer_size?"
            )
        self.size = len(rows)
        self._rows[: self.size] = rows.to(self._rows.device)
        self._next = int(state["next"])
