"""The steps of a PPO iteration, which `align.recipes.ppo` runs in order. Every rank runs every step.

sample      sample completions of the next prompts
score       score the completions and build the rollout batch
complete    add log-probabilities, values and advantages to the batch
update      update policy and critic on the batch's mini-batches
models      load policy, critic, reference and reward models
checkpoint  save and resume the run
log, panel  write metrics and samples, call trackers, show progress on the terminal
"""
