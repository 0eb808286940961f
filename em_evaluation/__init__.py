"""Images -> features -> statistics -> numbers -> report; knows images, never models."""
