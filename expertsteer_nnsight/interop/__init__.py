"""The package inside other people's tools."""
