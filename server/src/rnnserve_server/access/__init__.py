"""Who may do what: certificates, principals and their tokens, roles and quotas.

Knows nothing of sessions and of the wire. `api.guard` is what asks it, once a call.
"""
