"""The four steps as one estimator.

`expert_steer` has `ExpertSteer`, `reading` what it reads of the models, `layer_sweep` the choice of layers by what
steering there does, and `control_arms` the same fit with something else in the expert's place. The steps themselves are in
their own folders.
"""
