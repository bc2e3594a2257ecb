"""Run a recipe with several settings and seeds: `align sweep`.

axes     settings of the command line: grids, and ranges of a search
plan     points and seeds as runs of the recipe; which of their stages are equal
runner   starts the runs one after another, each stage once
search   optuna proposes the next point
results  values of each point over its seeds, and which point is best
text     the report as Markdown and for a terminal
page     the report as HTML
state    sweep.json
"""
