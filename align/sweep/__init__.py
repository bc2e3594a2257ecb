"""Run a recipe with several settings and seeds: `align sweep`.

axes     swept settings on the command line: grids, and ranges for a search
plan     points and seeds as runs of the recipe; identities of their stages
runner   starts the runs one after another, each stage once
search   proposals of optuna for the next point
results  metrics of each point over its seeds, and the best point
text     the report as Markdown and for a terminal
page     the report as HTML
state    sweep.json
"""
