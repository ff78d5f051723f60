"""Exits: gates, read-outs, the artefact on disk, and the policy."""
