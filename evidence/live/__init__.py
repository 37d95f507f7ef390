"""The measurement of live experts, in parts: `choices`, `factors`, `generation`, `texts` and `context`.

`slopes` fits maps on right answers. `results` keeps the lines in one file; `python -m evidence.live` runs what is missing and draws
the page.
"""
