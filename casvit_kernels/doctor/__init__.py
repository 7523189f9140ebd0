"""What is wrong with an installation, a process or a machine, and what to do about it.

`checkup()` looks at the process it is called in: call it in your own script, after what that imports.
`facts.py` gathers what there is; `installation.py`, `settings.py`, `threads.py`, `processor.py` and
`gpu.py` judge it, and compute nothing. `parity.py` and `speed.py` try the kernels out.
"""

from .finding import Finding
from .run import Checkup, checkup

__all__ = ["Checkup", "Finding", "checkup"]
