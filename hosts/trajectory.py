"""Trajectories on sockets: they stay on the compute device between nodes, and the host may evict them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..pipelines.core.errors import EditError
from ..pipelines.core.trajectory import Trajectory
from .host import keep_on_device
from .latent import SAMPLES


class DeviceTrajectory:
    """The value of an EDITKIT_TRAJECTORY socket; immutable.

    Attributes:
        rest: the other entries of the LATENT that was inverted (its image's size, batch indices); results inherit them.
    """

    def __init__(self, trajectory: Trajectory, like: Mapping[str, Any]) -> None:
        self.rest = {key: like[key] for key in like if key != SAMPLES}
        nothing = trajectory.source_latent.new_empty(0)  # a view would keep the memory alive
        self._bare = replace(trajectory, latents=nothing, source_latent=nothing)
        self._latents, self._source_latent = (
            keep_on_device(trajectory.latents),
            keep_on_device(trajectory.source_latent),
        )
        self._shape = list(trajectory.latents.shape)

    def get(self) -> Trajectory:
        """The trajectory on its device."""
        return replace(self._bare, latents=self._latents(), source_latent=self._source_latent())

    def __repr__(self) -> str:
        return f"Trajectory(sigmas={self._shape[0]}, latents={self._shape[1:]}, family={self._bare.family!r})"


def trajectory_out(trajectory: Trajectory, like: Mapping[str, Any]) -> DeviceTrajectory:
    """The socket value for the inversion of the LATENT `like`; nothing is copied to the host."""
    return DeviceTrajectory(trajectory, like)


def trajectory_in(value: Any, socket: str = "trajectory") -> Trajectory:
    """The trajectory of a socket. Raises EditError for something else."""
    if isinstance(value, Trajectory):
        return value
    if not isinstance(value, DeviceTrajectory):
        raise EditError(f"{socket} is a {type(value).__name__}: connect the trajectory of 'DDIM Inversion'")
    return value.get()


def trajectory_rest(value: Any) -> dict[str, Any]:
    """A LATENT without samples, for results made from a trajectory."""
    return dict(value.rest) if isinstance(value, DeviceTrajectory) else {}
