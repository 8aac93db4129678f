"""Triton kernels, installed as `fusedkl.kernels`: the backend "triton" (backend.py).

The folder stands beside `fusedkl/` and setup.py maps it into the package. Modules in it use
relative imports only: `import kernels` would name a folder of this checkout, or somebody else's
package of that name. Nothing imports them before the backend is first used: they import triton.
"""
