"""Step 4: what is done to the target.

Here live steering vectors and their operations (`vectors`), plans that apply them in any trace (`plan`), what is known of a plan
without its tensors (`header`) and its file (`plan_file`). What runs in a trace may run on a server, so it needs torch and
nnsight alone. How vectors are found and what they do is no business of this folder.
"""
