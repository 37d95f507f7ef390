"""The package inside other people's tools.

One module for each tool: lm-evaluation-harness, TransformerLens, the hub, and files of other libraries. A tool's library is
imported where it is used, so that it stays optional. Only the command line imports this folder, and the methods of
`SteeringPlan` that reach up: `push_to_hub`, `from_hub` and `to_transformer_lens`, which the linter names.
"""
