"""Few-step discrete flow-matching language models in JAX/Flax.

Dimension letters, used as suffixes of array names throughout (`logits_BLV`):

  B batch rows            L positions of a text block      V vocabulary, mask token included
  D residual width        H attention heads                K width of one head
  F hidden width of MLP   C width of conditioning          N transformer blocks
  S sampling steps        R rows of one part of a batch

Time runs from t=0 (noise) to t=1 (data); h is the width of one step. Schedules, rates, softmax and
losses are float32 whatever the dtype of the network.

References are to FS-DFM (arXiv:2509.20624) and Discrete Flow Matching (arXiv:2407.15595).
"""

__version__ = "0.1.0"
