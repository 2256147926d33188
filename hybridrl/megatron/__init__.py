"""Megatron-core models, engines and checkpoints: the only package that imports Megatron."""

import warnings

# At import Megatron warns of each optional package that is absent. The plan printed at the start says what runs.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
