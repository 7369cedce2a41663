"""What a plan counts with: a machine, an experiment's material, and the sizes of what its stages hold.

Each stage and analysis says what it needs of these beside its own code; `planning` adds up.
"""
