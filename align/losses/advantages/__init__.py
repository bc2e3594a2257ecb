"""What a completion's tokens are worth: one function a file, all from scores of a round of completions.

Every function returns advantages [B, T], zero where the mask is. G completions of one prompt stand behind each other.
"""

from align.losses.advantages.grpo import dr_grpo, grpo
from align.losses.advantages.ppo import ppo
from align.losses.advantages.reinforce_plus_plus import reinforce_plus_plus
from align.losses.advantages.rloo import rloo

__all__ = ["dr_grpo", "grpo", "ppo", "reinforce_plus_plus", "rloo"]
