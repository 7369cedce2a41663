"""What a plan is computed from: a machine, an experiment's material, and the sizes of what its stages hold.

Each stage and analysis says beside its own code what it needs; `planning` adds that up.
"""
