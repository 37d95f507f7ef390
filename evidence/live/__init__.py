"""The measurement of live experts, in parts: `choices`, `factors`, `generation`, `texts` and `context`.

`results` keeps their lines in one file; `python -m evidence.live` runs what is missing and draws the page.
"""
