"""What the methods promise, measured on the bundled model and checked by its oracle: `editkit claims`."""
