"""Trajectories between nodes: on the compute device, the host's to evict, with what their LATENT carried besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..pipelines.core.errors import EditError
from ..pipelines.core.trajectory import Trajectory
from .latent import SAMPLES
from .sockets import held


class HeldTrajectory:
    """What an EDITKIT_TRAJECTORY socket holds; immutable.

    Attributes:
        rest: the other entries of the LATENT that was inverted (its picture's size, batch indices): results inherit them.
    """

    def __init__(self, trajectory: Trajectory, like: Mapping[str, Any]) -> None:
        self.rest = {key: like[key] for key in like if key != SAMPLES}
        nothing = trajectory.source_latent.new_empty(0)  # not a view, which would keep the memory
        self._bare = replace(trajectory, latents=nothing, source_latent=nothing)
        self._latents, self._source_latent = held(trajectory.latents), held(trajectory.source_latent)
        self._shape = list(trajectory.latents.shape)

    def get(self) -> Trajectory:
        """The trajectory on its device."""
        return replace(self._bare, latents=self._latents(), source_latent=self._source_latent())

    def __repr__(self) -> str:
        return f"Trajectory(levels={self._shape[0]}, latents={self._shape[1:]}, family={self._bare.family!r})"


def trajectory_out(trajectory: Trajectory, like: Mapping[str, Any]) -> HeldTrajectory:
    """What to put on the socket for the inversion of the LATENT `like`; nothing is copied to the host."""
    return HeldTrajectory(trajectory, like)


def trajectory_in(value: Any, socket: str = "trajectory") -> Trajectory:
    """The trajectory of a socket. Raises EditError for something else."""
    if isinstance(value, Trajectory):
        return value
    if not isinstance(value, HeldTrajectory):
        raise EditError(f"{socket} is a {type(value).__name__}: connect the trajectory of 'Invert picture (DDIM)'")
    return value.get()


def trajectory_rest(value: Any) -> dict[str, Any]:
    """A LATENT without samples, for results made from a trajectory."""
    return dict(value.rest) if isinstance(value, HeldTrajectory) else {}
