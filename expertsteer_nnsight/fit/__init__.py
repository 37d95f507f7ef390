"""The whole method: a fixed vector, or an expert that reads along.

`expert_steer` has `ExpertSteer`, `reading` what it reads of the models, `layer_sweep` the choice of layers by what
steering there does, and `control_arms` the same fit with something else in the expert's place. `live_expert` has `LiveExpert`,
`live_generation` the text that is written while it reads on, `live_controls` what it must be compared with, and `surest_expert`
has several of them. The steps themselves are in their own folders.
"""
