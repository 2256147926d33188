"""Placement groups, worker groups and their executors."""
