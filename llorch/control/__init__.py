"""The control plane: accepts clients, keeps the registry, decides placement, relays streams.

Owns no task state that cannot be rebuilt from its nodes. Never imports from the node or the client.
"""
