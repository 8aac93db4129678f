"""Adapters to training frameworks, each imported by name: none of them is needed by fusedkl."""
