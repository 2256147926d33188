"""Trajectories as Arrow tables, packing for compute, load balancing, and prompt data sets."""
