"""The measurement of live experts: choice tasks (`choices`) and any text (`texts`), each a part of one command.

`results` keeps their lines in one file; `python -m evidence.live` runs what is missing and draws the page.
"""
