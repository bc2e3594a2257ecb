"""Policy optimisation, part by part; `align.recipes.ppo` tells the story.

draw      which prompts, and their completions
models      the models that take part
look_back what the trainer knows of a round before it learns: log-probabilities, values, advantages
update    epochs of mini-batches
state     what a killed run needs to go on
"""
