"""Parts of docs/conf.py, which builds the site: the reference from docstrings, and a check of the built pages."""
