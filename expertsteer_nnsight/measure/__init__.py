"""What a plan does, and what it costs.

Here live many plans in one forward (`rows` has the traced part, `scoring` the rest), many texts under one plan
(`continuations`), what a model writes (`rollouts`), effects on held-out items (`effects`, `judge`), strength under a KL budget
(`calibration`), and the comparison with controls (`measuring` makes it, `receipts` holds it; `answers` that of questions). Plans
come in from outside: nothing is fitted here but the judge.
"""
