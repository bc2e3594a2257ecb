"""Compare runs, stages and evaluations: `align compare`.

sides   reads each side: values per document, final metrics, curves and settings
build   the comparison as JSON: metrics with paired differences, settings that differ
text    the comparison for a terminal
page    the comparison as one HTML page, with curves on common charts
"""
