"""The operations, one folder each; the same file names in every folder.

`mixer`: the convolutional additive token mixer. `tracing.py`: who else follows a call. May not import:
modules, models, surgery.
"""
