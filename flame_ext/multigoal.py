"""A 2-D point and several equally good goals: the smallest task whose best policy is multimodal.

The multi-goal task of soft Q-learning (Haarnoja et al. 2017, section 5.1): from the origin every
goal is equally good, so the maximum-entropy policy goes to all of them. A Gaussian policy has one
mode per state: it leaves the choice to noise near the start; an expressive policy keeps every mode.

Importing this module registers the task as ``flame_ext/MultiGoal-v0``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray

ENV_ID = "flame_ext/MultiGoal-v0"
MAX_EPISODE_STEPS = 30

_ARENA = 7.0
_IMAGE_SIZE = 256
# Okabe-Ito colours, readable with every common form of colour blindness.
_GOAL_COLOUR = np.array([0, 158, 115], dtype=np.uint8)
_POINT_COLOUR = np.array([213, 94, 0], dtype=np.uint8)
_TRAIL_COLOUR = np.array([86, 180, 233], dtype=np.uint8)


class MultiGoalEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A point that moves by its action each step and ends its episode at any of the goals.

    Observation: position (2,), float32, in [-7, 7] (arena units).
    Action: displacement per step (2,), in [-1, 1].
    Reward: ``-distance_weight * d - action_cost * |a|^2``, plus ``goal_bonus`` on reaching a goal,
    with d the distance from the new position to the nearest goal.
    Termination: d <= ``goal_radius``; ``info["goal"]`` is then the goal's index, otherwise -1.

    The default action cost makes a diagonal first step (which covers more ground in the square
    action box) clearly worse than a step straight at a goal, so that Q at the origin has one
    separate maximum per goal and neither a ring nor a plateau. Rewards are scaled for temperatures
    between 0.1 and 0.3: there the optimal policy keeps apart the modes at the origin, but critics
    that are off by a tenth do not decide between equally good goals.

    Args:
        num_goals: Goals, evenly spaced on a circle, the first at angle 0. At least 1.
        goal_distance: Radius of that circle, in (goal_radius, 7].
        goal_radius: A goal counts as reached within this distance. Positive.
        start_noise: Standard deviation of the start around the origin. Not negative.
        distance_weight: Reward lost per step and unit of distance.
        action_cost: Reward lost per step and unit of squared action length.
        goal_bonus: Reward added on reaching a goal.
        render_mode: ``"rgb_array"`` or None.

    Raises:
        ValueError: If an argument is outside the range given above.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}  # type: ignore[misc]

    def __init__(
        self,
        num_goals: int = 4,
        goal_distance: float = 5.0,
        goal_radius: float = 1.0,
        start_noise: float = 0.01,
        distance_weight: float = 0.2,
        action_cost: float = 0.8,
        goal_bonus: float = 2.0,
        render_mode: str | None = None,
    ) -> None:
        if num_goals < 1:
            raise ValueError(f"num_goals={num_goals} was given; it must be at least 1.")
        if not 0.0 < goal_radius < goal_distance <= _ARENA:
            raise ValueError(
                f"goal_radius={goal_radius} and goal_distance={goal_distance} were given; they "
                f"must satisfy 0 < goal_radius < goal_distance <= {_ARENA}."
            )
        if start_noise < 0.0:
            raise ValueError(f"start_noise={start_noise} was given; it must not be negative.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode={render_mode!r} was given; allowed: 'rgb_array' or None."
            )
        self.goal_radius = goal_radius
        self.start_noise = start_noise
        self.distance_weight = distance_weight
        self.action_cost = action_cost
        self.goal_bonus = goal_bonus
        self.render_mode = render_mode
        angles = 2.0 * np.pi * np.arange(num_goals) / num_goals
        self.goals = goal_distance * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        self.position = np.zeros(2)
        self.trail = np.zeros((0, 2))
        self.observation_space = gymnasium.spaces.Box(-_ARENA, _ARENA, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Put the point near the origin; return its position (2,) and ``{"goal": -1}``."""
        super().reset(seed=seed, options=options)
        self.position = self.start_noise * self.np_random.standard_normal(2)
        self.trail = self.position[None].copy()
        return self.position.astype(np.float32), {"goal": -1}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move by ``action`` (2,), clipped to [-1, 1]; see the class for reward and end."""
        move = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self.position = np.clip(self.position + move, -_ARENA, _ARENA)
        self.trail = np.concatenate([self.trail, self.position[None]])
        distances = np.linalg.norm(self.goals - self.position, axis=1)
        nearest = int(np.argmin(distances))
        reached = bool(distances[nearest] <= self.goal_radius)
        reward = -self.distance_weight * float(distances[nearest])
        reward -= self.action_cost * float(move @ move)
        if reached:
            reward += self.goal_bonus
        info = {"goal": nearest if reached else -1}
        return self.position.astype(np.float32), reward, reached, False, info

    def render(self) -> NDArray[np.uint8] | None:
        """Return the arena as an image (256, 256, 3), or None without a render mode."""
        if self.render_mode is None:
            return None
        image = np.full((_IMAGE_SIZE, _IMAGE_SIZE, 3), 255, dtype=np.uint8)
        axis = (np.arange(_IMAGE_SIZE) + 0.5) / _IMAGE_SIZE * 2.0 * _ARENA - _ARENA
        # Image rows run downwards, the arena's second coordinate upwards.
        pixels = np.stack(np.meshgrid(axis, -axis), axis=-1)
        for goal in self.goals:
            _draw_disc(image, pixels, goal, self.goal_radius, _GOAL_COLOUR)
        for point in self.trail:
            _draw_disc(image, pixels, point, 0.08, _TRAIL_COLOUR)
        _draw_disc(image, pixels, self.position, 0.2, _POINT_COLOUR)
        return image


def _draw_disc(
    image: NDArray[np.uint8],
    pixels: NDArray[np.float64],
    centre: NDArray[np.float64],
    radius: float,
    colour: NDArray[np.uint8],
) -> None:
    """Paint a disc into image (H, W, 3); pixels (H, W, 2) holds each pixel's arena position."""
    image[np.linalg.norm(pixels - centre, axis=-1) <= radius] = colour


def register_multigoal() -> None:
    """Register ``flame_ext/MultiGoal-v0`` with Gymnasium, once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="flame_ext.multigoal:MultiGoalEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )


register_multigoal()
