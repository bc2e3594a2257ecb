"""Judge answers: single grades and comparisons of two models, by a language model at a server or by a reward model.

prompts     prompts of a judge, and the parsing of its verdict
calls       one call at an OpenAI-compatible server
ask         all calls of an evaluation: in order, several at a time, recorded, within a budget
grading     grades and comparisons from verdicts; missing verdicts are unscored
bias        position bias, length bias, and agreement of votes and of judges
scores      grades and comparisons by a reward model
"""
