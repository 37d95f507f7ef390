"""What models read.

Here live texts and chat messages as token ids (`texts`), labelled texts of every source (`labelled`), the check that anchors
are none of them (`overlap`), and the places where two tokenizers have read the same characters (`word_ends`). No model is run here.
"""
