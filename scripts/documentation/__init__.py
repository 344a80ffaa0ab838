"""What docs/conf.py builds the site with: the reference from docstrings, and a check of the pages that came out."""
