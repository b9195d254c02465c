"""Two tasks with an exact judge: Sudoku, and a language with a known law.

On text, quality is judged by another model, and its verdict can be bought with entropy. Here the
truth is known: a grid is valid or it is not, and the law of the language gives the probability of
every sample. Both tasks pass through the ordinary data path: documents, tokenizer, blocks.

    sudoku         sizes, puzzles as text, solver, puzzles with one solution
    grids          exactly uniform grids of all three sizes
    sudoku_judge   valid, distinct and solved grids, statistics against the uniform law
    hmm            a hidden Markov model: samples, likelihood, entropy, k-grams
    hmm_fit        text to tokens, and the law fitted to them by EM
    hmm_posterior  p(x1 | xt) in closed form: a denoiser without training error
    hmm_judge      samples against the law
    documents      writes either task as documents with a tokenizer

    python -m fsdfm_jax.exact --task=sudoku:6x6
    python -m fsdfm_jax.exact --task=hmm
"""
