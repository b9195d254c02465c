"""Two tasks with exact judges: Sudoku, and a language with a known law.

The quality of text is judged by another model, which low entropy can fool. Here the truth is known:
a grid is valid or not, and the law of the language gives the probability of every sample. Both
tasks use the normal data path: documents, tokenizer, blocks.

    sudoku         sizes, puzzles as text, solver, puzzles with one solution
    grids          exactly uniform grids of all three sizes
    sudoku_judge   valid, distinct and solved grids, tests against the uniform distribution
    hmm            a hidden Markov model: samples, likelihood, entropy, k-grams
    hmm_fit        tokenises text and fits the law by EM
    hmm_posterior  p(x1 | xt) in closed form: a denoiser without training error
    hmm_judge      compares samples with the law
    documents      writes either task as documents with a tokenizer

    python -m fsdfm_jax.exact --task=sudoku:6x6
    python -m fsdfm_jax.exact --task=hmm
"""
