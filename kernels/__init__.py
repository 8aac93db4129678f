"""Triton kernels, installed as `fusedkl.kernels`. None are here yet: fusedkl runs on CPUs so far.

The folder stands beside `fusedkl/` and setup.py maps it into the package. Modules in it use
relative imports only: `import kernels` would name a folder of this checkout, or somebody else's
package of that name.
"""
