"""Step 1: maps from the expert's space to the target's.

An aligner learns from paired activations, and maps activations and directions: `aligner` has the contract. Here live those in
closed form (`closed_form`), the auto-encoder (`autoencoder`), the controls with nothing to learn from (`controls`), and the
linear algebra that they share (`linear`). They see matrices: neither models, nor texts, nor labels may come in.
"""
