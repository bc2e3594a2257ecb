"""The steps of a PPO iteration; `align.recipes.ppo` puts them in order. Every rank runs all of them.

sample      sample the completions of the next prompts
score       score them and build the rollout batch
complete    add log-probabilities, values and advantages to the batch
update      update policy and critic over its mini-batches
models      policy, critic, reference, reward models
checkpoint  save and resume
log, panel  metrics, samples, trackers, terminal
"""
