"""Post-training for causal language models, dense or mixtures of experts.

Importing `align` is cheap: torch and transformers are loaded by the subpackages that need them.
"""

__version__ = "0.1.0"
