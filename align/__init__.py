"""Post-training for mixture-of-experts language models of the Hunyuan-Large family.

Importing `align` is cheap: torch and transformers are loaded by the subpackages that need them.
"""

__version__ = "0.1.0"
