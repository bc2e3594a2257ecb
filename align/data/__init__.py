"""Data: read sources, recognise formats, tokenise for each trainer. Independent of the model.

Import from the modules: `align.data.prepare` and `align.data.chat` load torch, `align.data.formats` does not.
"""
