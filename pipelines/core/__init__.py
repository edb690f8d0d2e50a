"""What every method is written with: protocols, sigmas, guidance, samplers, masks. Imports nothing else of `pipelines/`."""
