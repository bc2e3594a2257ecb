"""Judge answers: single grades and comparisons of two models, by a language model at a server or by a reward model.

prompts     what a judge is asked, and how its verdict is read
calls       one call at an OpenAI-compatible server
ask         all calls of an evaluation: in order, several at a time, recorded, within a budget
grading     grades and comparisons from verdicts; what could not be judged is unscored
bias        position bias, length bias, and agreement of votes and of judges
scores      grades and comparisons by a reward model
"""
