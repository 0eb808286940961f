"""Templates of the model cards; em_hub.card fills their placeholders from results."""
