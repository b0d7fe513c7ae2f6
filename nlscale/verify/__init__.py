"""Proofs that a user can run."""
