"""From texts to activations.

`collecting` has `collect`, `forward` the one traced forward that it repeats, here or on a server, `continued` the same for texts
that begin alike, `activations` what comes back, `shards` how that is kept on disk, and `fingerprint` which model it is of. Nothing
is steered and nothing is learnt here.
"""
