"""Rule-based reward functions, their registry, and the process pool that runs them."""
