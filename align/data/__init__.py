"""Data: read sources, recognise formats, tokenise for each trainer. Nothing here depends on a model architecture.

Import from the submodules, not from this package: `align.data.prepare` and `align.data.chat` load torch,
`align.data.shapes` does not.
"""
