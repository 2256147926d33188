"""Rollouts: vLLM servers and the fleet that shares a batch among them (importing this loads neither vLLM nor Ray)."""
