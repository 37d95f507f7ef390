"""Step 3: from activations and labels to a direction.

`find` is the one function that users call, `methods` what it chooses from, `rfm` the Recursive Feature Machine, `labels` what
they share about labels, groups and folds. They see matrices and labels: neither models nor texts may come in.
"""
