"""The client: what a person's or a script's side of the API looks like from Python.

Owns calls, streams of typed events, and their faults. Never imports from the control or the node.
"""
