"""Sets of parameters: what one is, which parameters a selection takes, random controls, ablation and grafting.

Analyses and interventions take a `ParamSet`, whatever selected it. It knows no tasks and no traces."""
