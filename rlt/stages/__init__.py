"""Stages: each reads and writes plain artefacts in a run folder of its own, one module a stage."""
