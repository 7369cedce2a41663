"""Sets of parameters: `ParamSet`, selection, random controls, ablation and grafting.

Analyses and interventions take a `ParamSet`, whatever selected it. It knows neither tasks nor traces.
"""
