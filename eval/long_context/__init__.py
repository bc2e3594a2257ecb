"""Long-context tests: needles in a text, and the task families of RULER (Hsieh et al. 2024, arXiv 2404.06654).

    texts       haystacks, and the words and values of needles
    fit         prompts of an exact number of tokens
    generate    the samples of each task
    score       the share of the expected texts that an answer contains
    grid        scores by task, length, depth and language, with intervals; weak places are named
    heat_map    the grid as SVG

Everything is generated from a seed and needs no download.
"""
