"""Adapters from third-party model classes to the protocols; each imports its library only when it is used."""
