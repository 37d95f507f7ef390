"""The measurement of live experts: choice tasks (`choices`), any text (`texts`), private context (`context`).

`results` keeps their lines in one file; `python -m evidence.live` runs what is missing and draws the page.
"""
