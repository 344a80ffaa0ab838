"""Trainings on data that packages ship, whose results docs/evidence.md shows. The commands are run.py and data.py."""
