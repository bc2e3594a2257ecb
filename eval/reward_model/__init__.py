"""Evaluation of reward models, from their scores: numbers in, numbers out.

pairs        accuracy by subset, bias to length and position, calibration, agreement of two models
best_of_n    gold score of the best of n completions, by n and by KL divergence
report       sentences about both
"""
