"""Public clients and tools, each in an environment of its own, against a server that the suite starts.

`make test-compat` runs it; `make test` does not, because the environments (`.venv-compat/<tool>`, pinned in
`requirements/<tool>.txt`) take minutes to make, once. What a client sees is asserted here; what it does is a script in
`clients/` or the tool's own command line.
"""
