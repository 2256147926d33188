"""The entry points and the training loops."""
