"""Help for those who type: completion of command lines, and the JSON Schema of experiments for editors.

Read first: __main__.py.
"""
