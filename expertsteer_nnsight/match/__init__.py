"""Step 2: which layer of the expert goes with which layer of the target.

`layer_scores` scores one pair of layers, `layer_matching` scores all, estimates what chance gives, and chooses pairs. They see
matrices alone.
"""
