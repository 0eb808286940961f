"""Templates of the model cards; every number in them is a placeholder, filled by em_hub.card from a run and a report."""
