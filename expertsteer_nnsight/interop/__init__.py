"""The package inside other people's tools.

One module for each tool: lm-evaluation-harness, TransformerLens, the hub, and files of other libraries. A tool's library is
imported where it is used, so that it stays optional. Nothing in the package imports this folder, but for two methods of
`SteeringPlan` that the linter names.
"""
