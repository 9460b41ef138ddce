"""`sparsekit demo`: a trained sentence encoder, pruned, recovered, converted and measured.

Running it needs the packages of the extra `sparsekit-kernels[demo]`; importing it does not.
"""

from sparsekit.demo.run import run

__all__ = ["run"]
