"""Estimators, penalties and losses of reinforcement learning as pure functions on packed response tokens.

Shape suffixes: R response tokens of a pack, flat; N sequences, with boundaries cu_resp [N + 1] (int32 or int64, from 0
to R). A token counts where response_mask != 0; what stands at the others (NaN, too) never reaches a result.
"""
