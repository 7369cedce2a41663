"""Causal language models: where they are read from, adapters, and which parameter belongs to which head or neuron.

It knows neither tasks nor training."""
