"""The base of every method: protocols, sigmas, noise, guidance, samplers, trajectories and masks."""
