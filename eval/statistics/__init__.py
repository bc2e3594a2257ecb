"""Statistics of an evaluation, in numpy alone.

    summary        one value per prompt: mean, interval, and the counts of excluded values
    intervals      confidence intervals of a mean and of a paired difference
    significance   paired tests, correction for several tests, minimum detectable effect
    ratings        Bradley-Terry strengths from comparisons
    passes         unbiased pass@k
    text           means and intervals as text

A value that cannot be known, such as the interval of a single prompt, is NaN or None and never 0.
"""
