"""Where every weight lives and how it moves between Hugging Face files, Megatron's ranks and the rollout engine."""
