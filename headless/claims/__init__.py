"""What the methods promise, measured on the bundled model and judged by its oracle: `editkit claims`."""
