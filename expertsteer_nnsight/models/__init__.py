"""A wrapped model: what all other steps know of it.

Here lives whatever reads a model's structure: where its residual stream is (`residual`), which tokens a running forward holds
(`positions`) and which prompts it begins with (`prompts`), which model it is (`identity`), nnsight's internals (`tracing`), and
models to try things on (`packaged`, `untrained`). What runs in a trace may run on a server, so it needs torch and nnsight alone.
Nothing here knows of texts, steering or measuring.
"""
